//! Who tells which pages a guest has written.

use multifd::dirty::uffd_wp::UffdUnavailable;

use super::{Asked, Check};

/// KVM, whose log is that of its guests.
pub fn kvm(asked: &Asked) -> Check {
    const NAME: &str = "kvm";
    let kvm = match &asked.kvm {
        Ok(kvm) => kvm,
        Err(why) => {
            let advice = "guests under KVM need /dev/kvm: have this user in its group, load kvm_intel or kvm_amd, or switch \
                          nested virtualisation on; the built-in guest runs as a process without it";
            return Check::warning(NAME, why, advice);
        }
    };
    let rings = match kvm.ring_entries {
        0 => "no dirty rings".to_owned(),
        entries => format!("dirty rings of up to {entries} pages, for guests that do not write fast"),
    };
    if kvm.manual_protection {
        return Check::ok(
            NAME,
            format!("usable, with a dirty log that is re-armed by hand and can be looked into; {rings}"),
        );
    }
    let advice = "a kernel with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: without it pages that the guest writes again are sent in each round";
    Check::warning(NAME, format!("usable, with a dirty log that cannot be looked into; {rings}"), advice)
}

/// What fills fresh memory in runs, and protects pages of guests without KVM.
pub fn userfaultfd(asked: &Asked) -> Check {
    const NAME: &str = "userfaultfd";
    match &asked.userfaultfd {
        Ok(()) => Check::ok(NAME, "usable: fresh memory is filled in runs, and writes by any process can be tracked"),
        Err(why @ UffdUnavailable::NotPermitted { .. }) => {
            let advice = "let the system call through (in a container: its seccomp profile), or give this process /dev/userfaultfd; \
                          without it fresh memory takes a page fault for each page";
            Check::warning(NAME, why.to_string(), advice)
        }
        Err(why) => Check::warning(
            NAME,
            why.to_string(),
            "a newer kernel; without it fresh memory takes a page fault for each page",
        ),
    }
}

/// What tells the pages that were written, of guests without KVM.
pub fn pagemap_scan(asked: &Asked) -> Check {
    const NAME: &str = "pagemap-scan";
    match &asked.pagemap_scan {
        Ok(()) => Check::ok(NAME, "usable: the kernel tells which pages were written, and which were never touched"),
        Err(why @ UffdUnavailable::NoPagemap { .. }) => {
            let advice = "/proc has to be mounted, and the process to be as privileged as when it started; guests without KVM \
                          mark their own writes meanwhile";
            Check::warning(NAME, why.to_string(), advice)
        }
        Err(why) => {
            Check::warning(NAME, why.to_string(), "a newer kernel; guests without KVM mark their own writes meanwhile")
        }
    }
}
