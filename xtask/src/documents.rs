//! Whether what the documents name exists: files, headings, items of the code, tests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};
use std::{fs, io};

use crate::test::root;

/// What the documents can name.
#[derive(Default)]
struct Tree {
    /// Files and folders, relative to the workspace.
    paths: BTreeSet<PathBuf>,
    /// Headings of each document, as links name them.
    headings: BTreeMap<PathBuf, BTreeSet<String>>,
    /// Words of the Rust code, without comments.
    words: BTreeSet<String>,
    /// Functions, files and folders of the Rust code, by the name by which `cargo test` selects them.
    tests: BTreeSet<String>,
}

impl Tree {
    fn read(root: &Path) -> io::Result<Tree> {
        let mut tree = Tree::default();
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(root.join(&folder))? {
                let entry = entry?;
                let name = entry.file_name();
                let name = name.to_string_lossy();
                if name == "target" || name == ".git" {
                    continue;
                }
                let path = folder.join(&*name);
                // The folder, not what a link leads to: a link to a file is a file.
                if entry.file_type()?.is_dir() {
                    folders.push(path.clone());
                } else if path.extension().is_some_and(|extension| extension == "rs" || extension == "md") {
                    tree.add(&path, &fs::read_to_string(root.join(&path))?);
                }
                tree.paths.insert(path);
            }
        }
        Ok(tree)
    }

    fn add(&mut self, path: &Path, text: &str) {
        self.paths.insert(path.to_owned());
        if path.extension().is_some_and(|extension| extension == "md") {
            let headings = prose(text).filter(|line| line.starts_with('#')).map(slug).collect();
            self.headings.insert(path.to_owned(), headings);
            return;
        }
        self.tests.extend(path.iter().map(|part| part.to_string_lossy().trim_end_matches(".rs").to_owned()));
        for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
            let words = line.split(|c: char| c != '_' && !c.is_alphanumeric()).filter(|word| !word.is_empty());
            self.words.extend(words.map(str::to_owned));
            if let Some((_, rest)) = line.split_once("fn ")
                && let Some((name, _)) = rest.split_once(['(', '<'])
            {
                self.tests.insert(name.to_owned());
            }
        }
    }

    /// Whether a code span names a file or a folder: from the workspace, from the folder of `document`, or by the end of its path.
    fn has_path(&self, document: &Path, named: &str) -> bool {
        let named = Path::new(named);
        let beside = normal(&document.parent().unwrap_or(Path::new("")).join(named));
        self.paths.contains(&beside) || self.paths.iter().any(|path| path.ends_with(named))
    }
}

/// All that `document` names and `tree` does not have.
fn missing(tree: &Tree, document: &Path, text: &str) -> Vec<String> {
    let mut missing = Vec::new();
    let mut in_test_table = false;
    let about_code = ["architecture.md", "choices.md", "security.md"].iter().any(|name| document.ends_with(name));
    for line in prose(text) {
        for target in links(line) {
            let (file, heading) =
                target.split_once('#').map_or((target, None), |(file, heading)| (file, Some(heading)));
            let path = match file {
                "" => document.to_owned(),
                file => normal(&document.parent().unwrap_or(Path::new("")).join(file)),
            };
            let has_heading = |heading| tree.headings.get(&path).is_some_and(|all| all.contains(heading));
            if !tree.paths.contains(&path) || !heading.is_none_or(has_heading) {
                missing.push(format!("link {target}"));
            }
        }
        for span in spans(line) {
            let is_path = span.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c));
            let is_item = span.split("::").all(|part| {
                part.starts_with(|c: char| c == '_' || c.is_ascii_alphabetic())
                    && part.chars().all(|c| c == '_' || c.is_ascii_alphanumeric())
            });
            if is_path && [".rs", ".md", ".rst", ".toml"].iter().any(|end| span.ends_with(end)) {
                if !tree.has_path(document, span) {
                    missing.push(format!("file {span}"));
                }
            } else if about_code && is_item && !in_test_table {
                // `std` and the crates around it are used in the code, so their items are among its words.
                if !span.split("::").all(|part| tree.words.contains(part) || tree.tests.contains(part)) {
                    missing.push(format!("item {span}"));
                }
            }
        }
        // A table of bounds: each row has to name its tests.
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        match cells[..] {
            ["", "resource", "bound", "test", ""] => in_test_table = true,
            ["", resource, _, tests, ""] if in_test_table && !resource.starts_with("--") => {
                let names: Vec<&str> = spans(tests).collect();
                if names.is_empty() {
                    missing.push(format!("test of {resource}"));
                }
                let unknown = names.into_iter().filter(|name| !name.split("::").all(|part| tree.tests.contains(part)));
                missing.extend(unknown.map(|name| format!("test {name}")));
            }
            [_] => in_test_table = false,
            _ => {}
        }
    }
    missing
}

/// The lines outside of fenced blocks.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fence && !fenced
    })
}

/// What is between backticks: one in Markdown, two in reStructuredText.
fn spans(line: &str) -> impl Iterator<Item = &str> {
    let mark = if line.contains("``") { "``" } else { "`" };
    line.split(mark).skip(1).step_by(2)
}

/// The targets of links within the repository.
fn links(line: &str) -> impl Iterator<Item = &str> {
    let targets = line.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(target, _)| target));
    targets.filter(|target| !target.contains("://"))
}

/// How a link names a heading.
fn slug(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|&c| c.is_alphanumeric() || " -_".contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// `docs/../x` as `x`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(normal.pop()),
            Component::CurDir => {}
            part => normal.push(part),
        }
    }
    normal
}

#[test]
fn all_that_the_documents_name_exists() {
    let root = root();
    let tree = Tree::read(&root).unwrap();
    let is_document =
        |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "md" || extension == "rst");
    let documents: Vec<&PathBuf> = tree.paths.iter().filter(is_document).collect();
    assert!(documents.len() > 8, "{documents:?}");
    let mut all = Vec::new();
    for document in documents {
        let text = fs::read_to_string(root.join(document)).unwrap();
        all.extend(missing(&tree, document, &text).iter().map(|what| format!("{}: {what}", document.display())));
    }
    assert!(all.is_empty(), "these do not exist:\n{}", all.join("\n"));
}

#[test]
fn whatever_does_not_exist_is_found() {
    let mut tree = Tree::default();
    tree.add(Path::new("engine/src/lib.rs"), "pub struct Source;\nfn run() {}\n// Gone\n");
    tree.add(Path::new("docs/security.md"), "# In doubt, and then?\n");
    let text = "\
        [a](../engine/src/lib.rs), [b](security.md#in-doubt-and-then), `src/lib.rs`, `Source::run`\n\
        [c](../engine/src/old.rs), [d](security.md#never), `src/old.rs`, `Source::Gone`\n\
        ```\n\
        [e](nowhere.md)\n\
        ```\n\
        | resource | bound | test |\n\
        |---|---|---|\n\
        | time | 1 s | `lib::run` |\n\
        | memory | 1 KiB | `lib::walk` |\n\
        | files | 7 | |\n";
    let expected = [
        "link ../engine/src/old.rs",
        "link security.md#never",
        "file src/old.rs",
        "item Source::Gone",
        "test lib::walk",
        "test of files",
    ];
    assert_eq!(missing(&tree, Path::new("docs/architecture.md"), text), expected);
    assert_eq!(missing(&tree, Path::new("docs/x.rst"), "``src/lib.rs`` and ``src/old.rs``"), ["file src/old.rs"]);
}
