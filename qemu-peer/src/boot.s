# The guest: a boot sector that rewrites its memory for ever and checks each page before it does.
#
# Pass n (from 1) visits `pages` pages from `start` upwards. Page p then holds
#     v(n, p) = n * PASS_STEP + p * PAGE_STEP   (modulo 2^32)   at offset 0, and its complement at offset 4092.
# From pass 2 on, each page must hold the values of pass n - 1 before it is rewritten; otherwise `errors` counts up. At the
# end of each pass one letter goes to COM1 (a..z, by pass number); if there was ever an error, `X` and
# eight hexadecimal digits (the count) follow it, after every pass.
#
# Assemble: as --32 boot.s -o boot.o && ld -m elf_i386 -Ttext 0x7c00 --oformat binary boot.o -o boot.bin

        .set PASS_STEP, 0x9e3779b1
        .set PAGE_STEP, 0x85ebca6b
        .set COM1, 0x3f8
        .set errors, 0x7e00             # the word after the sector

        .globl _start
        .text
        .code16
_start: cli
        xor     %ax, %ax
        mov     %ax, %ds
        in      $0x92, %al              # open address line 20
        or      $2, %al
        out     %al, $0x92
        lgdtl   gdt_pointer
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmp    $0x08, $protected

        .code32
protected:
        mov     $0x10, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $0x7c00, %esp
        movl    $0, errors
        xor     %esi, %esi              # esi: the pass

pass:   inc     %esi
        imul    $PASS_STEP, %esi, %ebx  # ebx: v(pass, page)
        mov     start, %edi             # edi: the page's address
        mov     pages, %ebp             # ebp: pages left
page:   cmp     $1, %esi
        je      write
        mov     %ebx, %eax
        sub     $PASS_STEP, %eax
        cmp     %eax, (%edi)
        jne     bad
        not     %eax
        cmp     %eax, 4092(%edi)
        je      write
bad:    incl    errors
write:  mov     %ebx, %eax
        mov     %eax, (%edi)
        not     %eax
        mov     %eax, 4092(%edi)
        mov     delay, %ecx
        jecxz   next
slow:   dec     %ecx
        jnz     slow
next:   add     $PAGE_STEP, %ebx
        add     $4096, %edi
        dec     %ebp
        jnz     page

        lea     -1(%esi), %eax
        xor     %edx, %edx
        mov     $26, %ecx
        div     %ecx
        lea     'a'(%edx), %eax
        call    print
        mov     errors, %ebp
        test    %ebp, %ebp
        jz      pass
        mov     $'X', %al
        call    print
        mov     $8, %ecx
digit:  rol     $4, %ebp
        mov     %ebp, %eax
        and     $15, %al
        add     $'0', %al
        cmp     $'9', %al
        jbe     1f
        add     $'A' - '9' - 1, %al
1:      call    print
        loop    digit
        jmp     pass

print:  mov     %al, %ah                # al to COM1, once its transmitter is empty
        mov     $COM1 + 5, %dx
1:      in      %dx, %al
        test    $0x20, %al
        jz      1b
        mov     %ah, %al
        mov     $COM1, %dx
        out     %al, %dx
        ret

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9a000000ffff      # code, 4 GiB
        .quad   0x00cf92000000ffff      # data, 4 GiB
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

        .org    0x1e0                   # parameters, written by the host into its copy of the sector
start:  .long   0x00100000
pages:  .long   256
delay:  .long   0
        .org    0x1fe
        .word   0xaa55
