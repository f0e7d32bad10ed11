//! Which dirty log a guest has: the best that works here, or the one that was asked for.

use multifd::dirty::{
    DirtyLog,
    bitmap::AtomicDirtyBitmap,
    uffd_wp::{UffdUnavailable, UffdWpLog},
};

use crate::{guest::GuestError, memory::Memory};

/// What is to track the guest's writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyLogChoice {
    /// The best that works here; never the ring.
    #[default]
    Auto,
    /// KVM's dirty log, for a KVM guest.
    KvmDirtyLog,
    /// KVM's dirty ring, for a KVM guest. A full ring stops its vCPU until it is collected, so it is not for guests that write fast, and
    /// is never chosen by itself.
    KvmDirtyRing,
    /// Write protection through userfaultfd, for either kind of guest.
    UffdWp,
    /// A bitmap in which the guest marks its own writes, for a process guest.
    Bitmap,
}

impl DirtyLogChoice {
    /// The word for it in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            DirtyLogChoice::Auto => "auto",
            DirtyLogChoice::KvmDirtyLog => "kvm-dirty-log",
            DirtyLogChoice::KvmDirtyRing => "kvm-dirty-ring",
            DirtyLogChoice::UffdWp => "uffd-wp",
            DirtyLogChoice::Bitmap => "bitmap",
        }
    }
}

/// A log that was chosen.
pub(crate) struct Chosen {
    pub(crate) log: Box<dyn DirtyLog + Send>,
    /// Never `Auto`.
    pub(crate) choice: DirtyLogChoice,
    /// Why another one was not, in words.
    pub(crate) reason: Option<String>,
}

impl Chosen {
    pub(crate) fn new(log: impl DirtyLog + Send + 'static, choice: DirtyLogChoice) -> Chosen {
        Chosen { log: Box::new(log), choice, reason: None }
    }

    fn because(self, reason: String) -> Chosen {
        Chosen { reason: Some(reason), ..self }
    }
}

/// Chooses for a guest whose threads can mark their own writes; they have to, if a bitmap is returned.
pub(crate) fn for_process(
    choice: DirtyLogChoice,
    memory: &Memory,
) -> Result<(Chosen, Option<AtomicDirtyBitmap>), GuestError> {
    let bitmap = || {
        let bitmap = AtomicDirtyBitmap::new(memory.ram.layout());
        (Chosen::new(bitmap.clone(), DirtyLogChoice::Bitmap), Some(bitmap))
    };
    match choice {
        DirtyLogChoice::Auto => Ok(uffd_wp().map_or_else(
            |why| {
                let (chosen, marks) = bitmap();
                (
                    chosen.because(format!("the guest marks its own writes, as the kernel does not track them: {why}")),
                    marks,
                )
            },
            |chosen| (chosen, None),
        )),
        DirtyLogChoice::UffdWp => Ok((uffd_wp().map_err(GuestError::no_log)?, None)),
        DirtyLogChoice::Bitmap => Ok(bitmap()),
        DirtyLogChoice::KvmDirtyLog | DirtyLogChoice::KvmDirtyRing => {
            Err(GuestError::Config { why: format!("{} needs a KVM guest", choice.name()) })
        }
    }
}

pub(crate) fn uffd_wp() -> Result<Chosen, UffdUnavailable> {
    Ok(Chosen::new(UffdWpLog::new()?, DirtyLogChoice::UffdWp))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn a_log_has_the_name_of_the_choice() {
        let memory = memory::allocate(1 << 20, memory::Backing::Anonymous).unwrap();
        let (bitmap, _) = for_process(DirtyLogChoice::Bitmap, &memory).unwrap();
        for chosen in [Some(bitmap), uffd_wp().ok()].into_iter().flatten() {
            assert_eq!(chosen.log.name(), chosen.choice.name());
        }
    }
}
