//! `cargo xtask dist`: a static binary, man pages and completions, a `.tar.gz` and a `.deb` of them, tried in an empty directory
//! that is all a process sees.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use test_support::TempDir;

use crate::step::{self, Outcome};
use crate::test::{cargo, root};

/// Makes all of it below `target/dist`; with `--check`, only what [`check`] does.
pub fn run(arguments: &[String]) -> Result<ExitCode, String> {
    match arguments {
        [] => {}
        [only] if only == "--check" => {
            return match check() {
                Outcome::Passed => Ok(ExitCode::SUCCESS),
                Outcome::Failed(reason) | Outcome::Skipped(reason) => Err(reason),
            };
        }
        _ => return Err("usage: cargo xtask dist [--check]".to_owned()),
    }
    if make(Profile::Release, &root().join("target/dist"))? == Tried::No {
        println!("=== not tried alone: that needs root");
    }
    Ok(ExitCode::SUCCESS)
}

/// The same of a build that takes a fraction of the time, below `target/dist-check`: a step of `cargo xtask test`.
pub fn check() -> Outcome {
    if output(Command::new("dpkg-deb").arg("--version")).is_err() {
        return Outcome::Skipped("dpkg-deb is not installed".to_owned());
    }
    match make(Profile::Dev, &root().join("target/dist-check")) {
        Ok(Tried::Yes) => Outcome::Passed,
        Ok(Tried::No) => {
            Outcome::Skipped("made, but not tried alone in an empty directory: that needs root".to_owned())
        }
        Err(reason) => Outcome::Failed(reason),
    }
}

/// What the binary is built for: users, or this check.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Profile {
    Release,
    Dev,
}

/// Whether the package was tried.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tried {
    Yes,
    No,
}

/// Makes all of it below `dist`.
fn make(profile: Profile, dist: &Path) -> Result<Tried, String> {
    let (target, reason) = target();
    println!("=== a static binary for {target}: {reason}");
    let binary = build(&target, profile)?;
    let tree = dist.join("tree");
    let _ = fs::remove_dir_all(&tree);
    fill(&tree, &binary)?;
    let (package, archive) = (dist.join(name("deb")), dist.join(name("tar.gz")));
    println!("=== {}", archive.display());
    done(Command::new("tar").arg("-C").arg(&tree).arg("-czf").arg(&archive).args(["--owner=0", "--group=0", "usr"]))?;
    println!("=== {}", package.display());
    control(&tree)?;
    done(Command::new("dpkg-deb").args(["--build", "--root-owner-group"]).arg(&tree).arg(&package))?;
    try_alone(&package)
}

/// What to build for, and why.
fn target() -> (String, String) {
    let arch = env::consts::ARCH;
    let musl = format!("{arch}-unknown-linux-musl");
    let gnu = format!("{arch}-unknown-linux-gnu");
    let root =
        output(Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())).args(["--print", "sysroot"]));
    let has_library = root.is_ok_and(|root| Path::new(root.trim()).join("lib/rustlib").join(&musl).is_dir());
    let has_compiler = output(Command::new("musl-gcc").arg("--version")).is_ok();
    match (has_library, has_compiler) {
        (true, true) => (musl, "musl, which looks up names of hosts by itself".to_owned()),
        (false, _) => {
            (gnu, format!("glibc, since rustup target add {musl} was not done; names of hosts need its libraries"))
        }
        (true, false) => {
            (gnu, "glibc, since musl-gcc (package musl-tools) is missing; names of hosts need its libraries".to_owned())
        }
    }
}

/// Builds the command, without anything that it would have to find where it runs.
fn build(target: &str, profile: Profile) -> Result<PathBuf, String> {
    let (profile, directory) = match profile {
        Profile::Release => ("release", "release"),
        Profile::Dev => ("dev", "debug"),
    };
    let mut command = cargo();
    command.args(["build", "--profile", profile, "--locked", "--package", "multifd-cli", "--target", target]);
    if target.ends_with("gnu") {
        command.env("RUSTFLAGS", "-C target-feature=+crt-static");
    }
    done(&mut command)?;
    let binary = root().join("target").join(target).join(directory).join("multifd");
    let interpreter = output(Command::new("readelf").arg("-l").arg(&binary))?;
    match interpreter.contains("INTERP") {
        true => Err(format!("{} is not static: it asks for an interpreter", binary.display())),
        false => Ok(binary),
    }
}

/// Puts everything where a distribution has it.
fn fill(tree: &Path, binary: &Path) -> Result<(), String> {
    let usr = tree.join("usr");
    copy(binary, &usr.join("bin/multifd"))?;
    let pages = TempDir::new().map_err(|error| format!("a temporary directory: {error}"))?;
    done(Command::new(binary).arg("pages").arg(pages.path()))?;
    let completions = pages.path().join("completions");
    copy(&completions.join("multifd.bash"), &usr.join("share/bash-completion/completions/multifd"))?;
    copy(&completions.join("_multifd"), &usr.join("share/zsh/vendor-completions/_multifd"))?;
    copy(&completions.join("multifd.fish"), &usr.join("share/fish/vendor_completions.d/multifd.fish"))?;
    for page in files(&pages.path().join("man1"))? {
        let to = usr.join("share/man/man1").join(page.file_name().unwrap_or_default());
        copy(&page, &to)?;
        done(Command::new("gzip").args(["-9nf"]).arg(&to))?;
    }
    for unit in files(&root().join("contrib"))? {
        let is_unit = unit.extension().is_some_and(|kind| kind == "service" || kind == "socket");
        let below = if is_unit { "lib/systemd/system" } else { "share/doc/multifd/contrib" };
        copy(&unit, &usr.join(below).join(unit.file_name().unwrap_or_default()))?;
    }
    for document in ["README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE-APACHE", "LICENSE-BSD-3-Clause"] {
        copy(&root().join(document), &usr.join("share/doc/multifd").join(document))?;
    }
    write(&usr.join("share/doc/multifd/copyright"), COPYRIGHT)
}

/// What `dpkg` has to know.
fn control(tree: &Path) -> Result<(), String> {
    let control = format!(
        "Package: multifd\nVersion: {}\nArchitecture: {}\nMaintainer: The multifd authors <multifd@localhost>\nSection: admin\n\
         Priority: optional\nHomepage: https://github.com/multifd/multifd\nDescription: Moves running virtual machines, in QEMU's multifd format\n \
         Sends, receives, serves, converts and inspects live migrations of QEMU and\n of VMMs that use the multifd library. The binary is static.\n",
        version(),
        architecture()
    );
    write(&tree.join("DEBIAN/control"), &control)
}

/// Unpacks `package` into an empty directory and runs what is in it, with that, /dev and /proc as its whole world.
fn try_alone(package: &Path) -> Result<Tried, String> {
    let alone = TempDir::new().map_err(|error| format!("a temporary directory: {error}"))?;
    done(Command::new("dpkg-deb").arg("--extract").arg(package).arg(alone.path()))?;
    for directory in ["dev", "proc", "tmp"] {
        make_parent(&alone.path().join(directory).join("x"))?;
    }
    // Mounted where no other process sees it, so that nothing is left to be unmounted.
    let inside = |args: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", ALONE]).arg(alone.path()).args(args);
        command
    };
    if output(&mut inside(&["--version"])).is_err_and(|error| error.contains("not permitted")) {
        return Ok(Tried::No);
    }
    println!("=== alone in an empty directory");
    done(&mut inside(&["--version"]))?;
    done(&mut inside(&["tls-init", "/tls", "--host", "127.0.0.1"]))?;
    for tls in [&[][..], &["--tls-dir", "/tls"]] {
        let demo = ["demo", "--guest", "process", "--memory", "16MiB", "--after", "1ms", "--progress", "never"];
        done(&mut inside(&[&demo, tls].concat()))?;
    }
    Ok(Tried::Yes)
}

fn name(kind: &str) -> String {
    format!("multifd_{}_{}.{kind}", version(), architecture())
}

fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// As Debian calls it.
fn architecture() -> &'static str {
    match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The files in `dir`, by name.
fn files(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    paths.sort();
    Ok(paths)
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    make_parent(to)?;
    fs::copy(from, to).map(drop).map_err(|error| format!("{} to {}: {error}", from.display(), to.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    make_parent(path)?;
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn make_parent(path: &Path) -> Result<(), String> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|error| format!("{}: {error}", parent.display()))
}

/// Runs `command`, which has to succeed.
fn done(command: &mut Command) -> Result<(), String> {
    match step::command(command, LIMIT) {
        Outcome::Passed => Ok(()),
        Outcome::Failed(reason) | Outcome::Skipped(reason) => Err(reason),
    }
}

/// What `command` prints.
fn output(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// For each command; a release build takes the longest.
const LIMIT: Duration = Duration::from_secs(1800);

const ALONE: &str =
    r#"mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" /usr/bin/multifd "$@""#;

const COPYRIGHT: &str = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: multifd
Source: https://github.com/multifd/multifd

Files: *
Copyright: The multifd authors
License: Apache-2.0 or BSD-3-Clause
Comment: The texts are in LICENSE-APACHE and LICENSE-BSD-3-Clause beside this file.
";
