//! What a destination's fresh memory costs.

use multifd::host::{FreshKind, LargePages, NoLargePages};

use super::{
    Check,
    settings::{READABLE, Settings},
};

/// Large pages for private memory.
pub fn private(settings: &Settings<'_>) -> Check {
    large_pages("large-pages", settings, FreshKind::Private)
}

/// Large pages for memory files.
pub fn shared(settings: &Settings<'_>) -> Check {
    large_pages("large-pages-shared", settings, FreshKind::Shared)
}

fn large_pages(name: &'static str, settings: &Settings<'_>, kind: FreshKind) -> Check {
    let of = if kind == FreshKind::Private { "private memory" } else { "memory files" };
    match LargePages::below(settings.root(), kind) {
        Ok(pages) if pages.largest_unasked > 0 => {
            let kib = pages.largest_unasked >> 10;
            let found =
                format!("{of}: up to {kib} KiB come unasked, so a sparse guest takes up to four times its content");
            Check::ok(name, found)
        }
        Ok(_) => {
            Check::ok(name, format!("{of}: 64 to 512 KiB where they are asked for, and used where they cost less"))
        }
        Err(NoLargePages::Off { word, file }) => Check::warning(
            name,
            format!("{of}: no pages of 64 to 512 KiB, which may cost a destination a fraction of the CPU time"),
            format!("echo {word} > {}", file.display()),
        ),
        Err(why @ NoLargePages::Missing) => Check::warning(name, format!("{of}: {why}"), "a newer kernel"),
        Err(why) => Check::not_known(name, why.to_string(), READABLE),
    }
}

/// How many mappings a process may have: memory that large pages are asked for takes some.
pub fn mappings(settings: &Settings<'_>) -> Check {
    const NAME: &str = "mappings";
    match settings.number("proc/sys/vm/max_map_count") {
        Ok(count) if count >= MAPPINGS => Check::ok(NAME, format!("{count} for a process")),
        Ok(count) => Check::warning(
            NAME,
            format!("{count} for a process: memory in many pieces gets no large pages"),
            format!("sysctl vm.max_map_count={MAPPINGS}"),
        ),
        Err(error) => error.check(NAME),
    }
}

/// What Linux permits by itself; a RAM block in 8,192 pieces takes a quarter of it.
const MAPPINGS: u64 = 65_530;
