//! Every type of another crate that a caller meets in a signature of `multifd` can be named through `multifd`, so that a VMM needs no
//! dependency of the right version beside it. Types of this crate that cannot be named are found by the compiler
//! (`unnameable_types` in `lib.rs`).
//!
//! This reads the source: what a file imports from another package and mentions in something public has to be re-exported by a
//! module, or its crate has to be.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Packages whose types can occur in signatures.
const PACKAGES: [&str; 8] =
    ["multifd_proto", "vm_memory", "rustls", "rustix", "kvm_ioctls", "kvm_bindings", "vmm_sys_util", "linux_raw_sys"];

#[test]
fn types_of_other_crates_in_signatures_are_re_exported() {
    let files: Vec<(PathBuf, String)> = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    assert!(files.len() > 100, "{} files", files.len());
    let exported: BTreeSet<String> =
        files.iter().flat_map(|(_, text)| imports(text, "pub use ")).map(|(_, name)| name).collect();
    assert!(exported.contains("BlockName") && exported.contains("Extensions"), "{exported:?}");
    let whole = |package: &str| {
        let statement = format!("\npub use {package};\n");
        package != "multifd_proto" && files.iter().any(|(_, text)| text.contains(&statement))
    };
    let mut missing = Vec::new();
    for (path, text) in &files {
        let foreign: BTreeMap<String, String> = imports(text, "use ")
            .into_iter()
            .filter(|(package, _)| !whole(package))
            .map(|(package, name)| (name, package))
            .collect();
        for (number, line) in public_lines(text) {
            for word in words(line).filter(|word| foreign.contains_key(*word) && !exported.contains(*word)) {
                let place = path.file_name().unwrap().display();
                missing.push(format!("{place}:{number}: {word} of {}: {line}", foreign[word]));
            }
        }
    }
    assert!(missing.is_empty(), "not re-exported:\n{}", missing.join("\n"));
}

/// As a VMM imports them. That this compiles is the test.
#[test]
fn what_a_vmm_meets_has_a_name_where_it_is_used() {
    use multifd::{
        destination::Extensions,
        error::{DecodeError, ProtocolError, Violation},
        inspect::Command,
        ram::BlockName,
        source::{BlockEntry, Compression, Dialect, ZeroPages},
        threads::ChannelId,
    };

    let names = [
        std::any::type_name::<(Extensions, DecodeError, ProtocolError, Violation)>(),
        std::any::type_name::<(Command, BlockName, BlockEntry, Compression, Dialect, ZeroPages, ChannelId)>(),
    ];
    assert!(names.iter().all(|name| name.contains("multifd_proto")));
}

/// All files below `directory` that are no tests, without the tests in them.
fn sources(directory: &Path) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("testing") {
            files.append(&mut sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let text = text.split("\nmod tests {").next().unwrap().to_owned();
            files.push((path, text));
        }
    }
    files
}

/// Package and name of all types that `text` imports from [`PACKAGES`] by statements that begin with `keyword`.
fn imports(text: &str, keyword: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for statement in text.split(';') {
        let Some(at) = statement.rfind(&format!("\n{keyword}")) else { continue };
        let imported = &statement[at + 1 + keyword.len()..];
        let Some(package) = words(imported).next().filter(|word| PACKAGES.contains(word)) else { continue };
        let types = words(imported).filter(|word| word.starts_with(|first: char| first.is_ascii_uppercase()));
        found.extend(types.map(|name| (package.to_owned(), name.to_owned())));
    }
    found
}

/// The lines of `text` that can be a part of the interface, with their numbers: what is declared `pub`, and all of a public enum.
fn public_lines(text: &str) -> Vec<(usize, &str)> {
    let mut in_enum = false;
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let code = line.trim_start();
        in_enum = (in_enum && line != "}") || code.starts_with("pub enum ");
        let is_public = code.starts_with("pub ") && !code.starts_with("pub use ") && !code.starts_with("pub mod ");
        if (is_public || in_enum) && !code.starts_with("//") {
            // A parameter is a name, and no type.
            found.push((index + 1, code.split("Item =").next().unwrap_or(code)));
        }
    }
    found
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|character: char| !character.is_alphanumeric() && character != '_').filter(|word| !word.is_empty())
}
