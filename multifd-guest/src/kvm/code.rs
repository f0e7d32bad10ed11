//! The program that the KVM guest runs: user-mode code that uses no stack and makes no calls.
//!
//! Everything it needs to go on is in registers, so the vCPU's state is the whole state of the program:
//!
//! | register | holds |
//! |---|---|
//! | `rsi` | pages finished since the beginning, over all passes |
//! | `rdi` | the next word of the present page |
//! | `rcx`, `rax`, `rdx`, `r8`, `r9`, `r10` | within a page: words left, value to write, value expected, gap, steps of both |
//! | `r11` | zero mask |
//! | `r12` | value of the page's first word in this pass, zero pages left aside |
//! | `r13` | page + pass |
//! | `rbx` | its word in the mailbox, where the host says how far it may go |
//! | `rbp` | its page in the control block |
//! | `xmm0`, `xmm1` | pages finished once more, and the constant 1 |
//!
//! The host can stop it between any two instructions and still knows what every word of memory has to be:
//! `stosq` writes a word and moves `rdi` past it in one instruction, so `rdi` tells how many words of the present page
//! are written; `inc rsi` makes the page the last one's successor in one instruction, and until then `rdi` has not left
//! it. [`words_done`] is that argument as code.

// The assembler counts as unsafe. The program is kept as data: nothing in this process jumps to it.
#![allow(unsafe_code)]

use std::arch::global_asm;

use crate::{memory::field, pattern::PAGE_SIZE, sys};

global_asm!(
    ".pushsection .rodata.multifd_guest_code, \"a\", @progbits",
    ".globl multifd_guest_code_start",
    ".globl multifd_guest_code_end",
    "multifd_guest_code_start:",
    "20:",
    "    cmp rsi, [rbx]", // the budget: checked before each page, so the host need not interrupt us to change it
    "    jae 90f",
    // Values of this pass and of the one before.
    "    mov rax, r12",
    "    mov rdx, r12",
    "    sub rdx, [rbp + {PASS_STEP}]",
    "    mov r10, [rbp + {WORD_STEP}]",
    "    mov r9, r10",
    "    mov r8, r13",
    "    and r8, r11",
    "    cmp r8, r11",
    "    jne 30f",
    "    xor eax, eax", // a zero page in this pass
    "    xor r10d, r10d",
    "30:",
    "    lea r8, [r13 - 1]",
    "    and r8, r11",
    "    cmp r8, r11",
    "    jne 40f",
    "    xor edx, edx", // a zero page in the pass before
    "    xor r9d, r9d",
    "40:",
    "    mov rcx, [rbp + {WORDS}]",
    "    mov r8, [rbp + {GAP}]",
    "50:",
    "    cmp [rdi], rdx",
    "    jne 80f",
    "60:",
    "    stosq",
    "    add rdi, r8",
    "    add rax, r10",
    "    add rdx, r9",
    "    dec rcx",
    "    jnz 50b",
    "    and rdi, -{PAGE_SIZE}", // with a gap, `rdi` is past the end by less than a page
    // The page is written.
    "    cmp [rbp + {PAGES_DONE}], rsi",
    "    jne 85f",
    "70:",
    "    inc rsi",
    "    mov [rbp + {PAGES_DONE}], rsi",
    "    paddq xmm0, xmm1",
    "    movq [rbp + {REGISTER}], xmm0",
    "    add r12, [rbp + {PAGE_STEP}]",
    "    inc r13",
    "    cmp rdi, [rbp + {END}]",
    "    jne 20b",
    // The pass is over.
    "    mov rdi, [rbp + {START}]",
    "    add r12, [rbp + {VALUE_WRAP}]",
    "    add r13, [rbp + {SUM_WRAP}]",
    "    movq rax, xmm0",
    "    cmp rax, rsi",
    "    je 20b",
    "    inc qword ptr [rbp + {REGISTER_ERRORS}]",
    "    jmp 20b",
    "80:",
    "    inc qword ptr [rbp + {WRONG_WORDS}]",
    "    mov [rbp + {WRONG_AT}], rdi",
    "    jmp 60b",
    "85:",
    "    inc qword ptr [rbp + {REPORT_ERRORS}]",
    "    jmp 70b",
    "90:",
    "    out {PORT}, al", // leaves the guest; the host comes back when there is a budget
    "    jmp 20b",
    "multifd_guest_code_end:",
    ".popsection",
    WORDS = const field::WORDS,
    GAP = const field::GAP,
    WORD_STEP = const field::WORD_STEP,
    PASS_STEP = const field::PASS_STEP,
    PAGE_STEP = const field::PAGE_STEP,
    VALUE_WRAP = const field::VALUE_WRAP,
    SUM_WRAP = const field::SUM_WRAP,
    START = const field::START,
    END = const field::END,
    PAGES_DONE = const field::PAGES_DONE,
    WRONG_WORDS = const field::WRONG_WORDS,
    WRONG_AT = const field::WRONG_AT,
    REGISTER = const field::REGISTER,
    REGISTER_ERRORS = const field::REGISTER_ERRORS,
    REPORT_ERRORS = const field::REPORT_ERRORS,
    PAGE_SIZE = const PAGE_SIZE,
    PORT = const BUDGET_PORT,
);

// SAFETY: both symbols are labels of the block above; neither is ever written.
unsafe extern "C" {
    safe static multifd_guest_code_start: u8;
    safe static multifd_guest_code_end: u8;
}

/// The program. It runs at any address.
pub(crate) fn program() -> &'static [u8] {
    sys::kvm::code(&multifd_guest_code_start, &multifd_guest_code_end)
}

/// How many words of the page at `page` are written when the program has been stopped with `rdi` at that value.
///
/// `page` is the address of the page with number `rsi` modulo the share. Past the last word, `rdi` is anywhere up to a
/// stride further; right after the last page of a pass it is at the end of the share, far away from the first page:
/// a share has at least two pages.
pub(crate) fn words_done(rdi: u64, page: u64, words: u64, stride: u64) -> u64 {
    match rdi.checked_sub(page) {
        Some(offset) if offset <= words * stride => offset.div_ceil(stride).min(words),
        _ => 0,
    }
}

/// The port by which the program asks for a budget.
pub(crate) const BUDGET_PORT: u16 = 0x42;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pattern::Writes;

    #[test]
    fn the_program_fits_into_its_page() {
        assert!((100..PAGE_SIZE).contains(&program().len()), "{}", program().len());
        // `cmp rsi, [rbx]`: the labels are where they should be.
        assert_eq!(program()[..3], [0x48, 0x3b, 0x33]);
    }

    #[test]
    fn rdi_tells_how_many_words_are_written() {
        let page = 0x10_0000;
        for writes in [Writes::Marks, Writes::WholePages] {
            let (words, stride) = (writes.words(), writes.stride());
            let done = |rdi| words_done(rdi, page, words, stride);
            assert_eq!(done(page), 0);
            for word in 0..words {
                // After `stosq`, and after the gap was added.
                assert_eq!(done(page + word * stride + 8), word + 1);
                assert_eq!(done(page + (word + 1) * stride), word + 1);
            }
            // Aligned down again, before the page is counted.
            assert_eq!(done(page + PAGE_SIZE as u64), words);
            // The next page is counted: either its first byte, or the end of the share while the page is the first.
            assert_eq!(words_done(page + 4096, page + 4096, words, stride), 0);
            assert_eq!(words_done(page + 8192, page, words, stride), 0);
        }
    }
}
