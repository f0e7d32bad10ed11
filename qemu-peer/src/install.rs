//! Makes QEMU 7.2, 10.0 and 11.1 available below the build directory, without changing the system.
//!
//! All are Debian's own packages: 7.2 from Debian 12, 10.0 from its backports, 11.1 from the backports of Debian 13. apt
//! resolves and downloads them with a private state (sources derived from the machine's own, so mirrors and proxies are
//! respected), `dpkg -x` unpacks them into `target/qemu/VERSION`, together with the shared libraries the machine lacks.
//! For 11.1 those are all libraries, with the C library among them: it is started by its own dynamic loader. No step
//! needs to be root. (No Debian release that is still served has a QEMU 8 or 9.)
//! A directory exists under its final name only when its QEMU has run, and a file lock keeps test processes that run
//! side by side from installing twice; the second call costs a look at that directory.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{env, io, thread};

use test_support::{in_ci, skip};

use crate::Error;

/// A QEMU version that serves as peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// Synchronises at each section; SYNC packets may carry pages; zero pages travel on main.
    V7_2,
    /// Synchronises per round with machine types from 8.1 on; has mapped-ram files.
    V10_0,
    /// Sends early device state before the list of RAM blocks, and takes a switchover acknowledgement only where one is
    /// due.
    V11_1,
}

impl Version {
    /// All of them, older first.
    pub const ALL: [Self; 3] = [Self::V7_2, Self::V10_0, Self::V11_1];

    /// `7.2`, `10.0` or `11.1`.
    pub fn name(self) -> &'static str {
        match self {
            Self::V7_2 => "7.2",
            Self::V10_0 => "10.0",
            Self::V11_1 => "11.1",
        }
    }

    /// The environment variable that names a binary to use instead of installing one.
    pub fn variable(self) -> &'static str {
        match self {
            Self::V7_2 => "MULTIFD_QEMU_7_2",
            Self::V10_0 => "MULTIFD_QEMU_10_0",
            Self::V11_1 => "MULTIFD_QEMU_11_1",
        }
    }

    /// The Debian release whose packages and libraries it uses.
    fn release(self) -> &'static str {
        match self {
            Self::V7_2 | Self::V10_0 => RELEASE,
            Self::V11_1 => NEXT_RELEASE,
        }
    }

    /// The part of that release which has it.
    fn suite(self) -> String {
        match self {
            Self::V7_2 => self.release().to_owned(),
            Self::V10_0 | Self::V11_1 => format!("{}-backports", self.release()),
        }
    }

    /// Whether a test may be skipped for want of it where a missing QEMU is otherwise a failure.
    ///
    /// Packages of another release than the machine's need more of a mirror, and a keyring that knows that release.
    fn is_optional(self) -> bool {
        self.release() != RELEASE
    }
}

/// A QEMU that can be started.
#[derive(Debug, Clone)]
pub struct Installed {
    version: Version,
    binary: PathBuf,
    /// Where it was unpacked; `None` for a binary named by the environment, which finds its own files.
    prefix: Option<PathBuf>,
}

impl Installed {
    /// Finds or installs `version`.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] with the reason, if this machine cannot have it.
    pub fn find(version: Version) -> Result<Self, Error> {
        let unavailable = |reason| Error::Unavailable { version: version.name(), reason };
        if let Some(binary) = env::var_os(version.variable()).filter(|path| !path.is_empty()) {
            let named = Self { version, binary: binary.into(), prefix: None };
            named.check(None).map_err(|reason| unavailable(format!("{}: {reason}", version.variable())))?;
            return Ok(named);
        }
        let root = root();
        let prefix = root.join(version.name());
        let installed = Self { version, binary: prefix.join(BINARY), prefix: Some(prefix.clone()) };
        if prefix.exists() {
            return Ok(installed);
        }
        let locked = || -> io::Result<File> {
            fs::create_dir_all(&root)?;
            let file = File::create(root.join("lock"))?;
            rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
            Ok(file)
        };
        // Released when it is dropped, and by the kernel if this process is killed.
        let _lock = locked().map_err(|error| unavailable(format!("{}: {error}", root.display())))?;
        if !prefix.exists() {
            // One attempt per process: without a mirror each takes minutes, and many tests ask.
            static FAILED: Mutex<BTreeMap<&str, String>> = Mutex::new(BTreeMap::new());
            let mut failed = FAILED.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(reason) = failed.get(version.name()) {
                return Err(unavailable(reason.clone()));
            }
            install(version, &root).map_err(|reason| {
                failed.insert(version.name(), reason.clone());
                unavailable(reason)
            })?;
        }
        Ok(installed)
    }

    /// The QEMU for a test, or `None` after declaring the test as skipped.
    ///
    /// # Panics
    ///
    /// With `CI=true`, if 7.2 or 10.0 is not available: there a missing QEMU is a failure. 11.1, which is of another
    /// Debian release, is skipped there too. `MULTIFD_WITHOUT_QEMU` leaves all of them out on purpose.
    pub fn require(version: Version) -> Option<Self> {
        if env::var_os("MULTIFD_WITHOUT_QEMU").is_some() {
            skip("tests with QEMU are left out (MULTIFD_WITHOUT_QEMU)");
            return None;
        }
        match Self::find(version) {
            Ok(installed) => Some(installed),
            Err(error) if in_ci() && !version.is_optional() => panic!("{error}"),
            Err(error) => {
                skip(&error.to_string());
                None
            }
        }
    }

    /// Which version this is.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The executable.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// Where it was unpacked; `None` for a binary named by the environment.
    pub fn prefix(&self) -> Option<&Path> {
        self.prefix.as_deref()
    }

    /// A command that starts this QEMU with its own libraries, modules and firmware; the caller adds the machine.
    ///
    /// `wrapper` is a program, with arguments, that executes QEMU in its own place.
    pub fn command(&self, wrapper: &[&str]) -> Command {
        let libraries = self.prefix.as_deref().map(library_directories).unwrap_or_default();
        let mut words: Vec<OsString> = wrapper.iter().map(OsString::from).collect();
        let loader = self.prefix.as_ref().map(|prefix| prefix.join(LOADER)).filter(|path| path.exists());
        if let Some(loader) = &loader {
            // Libraries of a newer C library cannot be loaded by the machine's own loader, nor the other way round.
            words.extend([loader.into(), "--library-path".into(), joined(&libraries)]);
        }
        words.push(self.binary.clone().into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null());
        let Some(prefix) = &self.prefix else {
            return command;
        };
        if loader.is_none() && !libraries.is_empty() {
            let inherited = env::var_os("LD_LIBRARY_PATH").filter(|path| !path.is_empty());
            let all: Vec<PathBuf> =
                libraries.iter().cloned().chain(inherited.iter().flat_map(env::split_paths)).collect();
            command.env("LD_LIBRARY_PATH", joined(&all));
        }
        if let Some(modules) = libraries.iter().map(|path| path.join("qemu")).find(|path| path.is_dir()) {
            command.env("QEMU_MODULE_DIR", modules);
        }
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(prefix.join(firmware));
        }
        command
    }

    /// Runs `--version`; with `expected` the version must begin with it.
    fn check(&self, expected: Option<&str>) -> Result<(), String> {
        let mut command = self.command(&[]);
        command.arg("--version");
        let output = command.output().map_err(|error| format!("{}: {error}", self.binary.display()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let found = text.strip_prefix("QEMU emulator version ").unwrap_or_default();
        if !output.status.success() || found.is_empty() {
            return Err(format!("does not run: {}", String::from_utf8_lossy(&output.stderr).trim()));
        }
        match expected {
            Some(expected) if !found.starts_with(&format!("{expected}.")) => {
                Err(format!("the package mirror has version {}", found.lines().next().unwrap_or(found)))
            }
            _ => Ok(()),
        }
    }
}

/// A list of directories in one word; empty if one of them has a colon in its name.
fn joined(directories: &[PathBuf]) -> OsString {
    env::join_paths(directories).unwrap_or_default()
}

/// Where all versions are unpacked: `MULTIFD_QEMU_DIR`, or `target/qemu` of this workspace.
fn root() -> PathBuf {
    match env::var_os("MULTIFD_QEMU_DIR").filter(|path| !path.is_empty()) {
        Some(path) => path.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target").join("qemu"),
    }
}

fn install(version: Version, root: &Path) -> Result<(), String> {
    check_release()?;
    let state = PrivateApt::create(root, version.release())?;
    state.apt_get(&["update"])?;
    // `update` reports unreachable mirrors as warnings and succeeds, so its words are the reason when this fails.
    let warnings = last_lines(&state.log());
    let packages = state
        .download(&["-t", &version.suite(), "qemu-system-x86"])
        .map_err(|reason| format!("{reason} (before that, apt-get update said: {warnings})"))?;

    let partial = state.unpack(root, version.name(), &packages)?;
    let unpacked = Installed { version, binary: partial.join(BINARY), prefix: Some(partial.clone()) };
    unpacked.check(Some(version.name()))?;
    fs::rename(&partial, root.join(version.name())).map_err(|error| format!("{}: {error}", partial.display()))
}

/// Has `packages` of this machine's release, and what they need that is not installed, unpacked into the directory `name`
/// beside the QEMUs, with all of it below `usr`. Returns where.
pub(crate) fn packages_beside(name: &str, packages: &[&str]) -> Result<PathBuf, String> {
    let root = root();
    let prefix = root.join(name);
    if prefix.exists() {
        return Ok(prefix);
    }
    let text = |error: io::Error| format!("{}: {error}", root.display());
    fs::create_dir_all(&root).map_err(text)?;
    let lock = File::create(root.join("lock")).map_err(text)?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).map_err(|error| text(error.into()))?;
    if prefix.exists() {
        return Ok(prefix);
    }
    check_release()?;
    let state = PrivateApt::create(&root, RELEASE)?;
    state.apt_get(&["update"])?;
    let downloaded = state.download(packages)?;
    let partial = state.unpack(&root, name, &downloaded)?;
    if partial.join("lib").is_dir() {
        // On the machine itself the one is a link to the other.
        let mut merge = Command::new("cp");
        merge.arg("-a").arg(partial.join("lib/.")).arg(partial.join("usr/lib"));
        run(merge, &state.log(), STEP_LIMIT)?;
    }
    fs::rename(&partial, &prefix).map_err(text)?;
    Ok(prefix)
}

/// Checks that the machine runs the Debian release whose apt sources and libraries the packages go with.
fn check_release() -> Result<(), String> {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or("unknown");
    match name.trim_matches('"') {
        RELEASE => Ok(()),
        other => {
            let variables = Version::ALL.map(Version::variable).join(", ");
            Err(format!(
                "the packages are for Debian 12 ({RELEASE}), this system is `{other}`; {variables} name binaries"
            ))
        }
    }
}

/// apt with lists, cache, sources and package state of its own.
struct PrivateApt {
    directory: PathBuf,
}

impl PrivateApt {
    /// Prepares apt for the packages of `release`.
    ///
    /// Those of the machine's own release are added to what is installed. Of another release everything is needed.
    fn create(root: &Path, release: &str) -> Result<Self, String> {
        let directory = root.join("apt");
        let write = |name: &str, text: &str| {
            let path = directory.join(name);
            fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))
        };
        for name in ["lists/partial", "cache/archives/partial", "sources", "preferences"] {
            let path = directory.join(name);
            fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        }
        let mut sources = Sources::of_this_machine()?.for_release(RELEASE);
        if sources.is_empty() {
            return Err(format!("no apt source for {RELEASE} below /etc/apt"));
        }
        let mut status = String::new();
        if release == RELEASE {
            status = fs::read_to_string(DPKG_STATUS).map_err(|error| format!("{DPKG_STATUS}: {error}"))?;
        } else {
            sources = sources.moved_to(release);
        }
        write("sources/private.list", &sources.one_line)?;
        write("sources/private.sources", &sources.deb822)?;
        write("status", &private_status(&status))?;
        write("apt.conf", &configuration(&directory))?;
        Ok(Self { directory })
    }

    fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    fn apt_get(&self, arguments: &[&str]) -> Result<(), String> {
        let mut command = Command::new("apt-get");
        // `-c` is read after all of the system's configuration, so it wins; proxies set there stay in force.
        command.arg("-c").arg(self.directory.join("apt.conf")).arg("-q").args(arguments);
        run(command, &self.log(), STEP_LIMIT)
    }

    /// Unpacks `packages`, which are removed, into a directory in `root` that is yet to be called `name`.
    fn unpack(&self, root: &Path, name: &str, packages: &[PathBuf]) -> Result<PathBuf, String> {
        let partial = root.join(format!("{name}.partial"));
        let _ = fs::remove_dir_all(&partial);
        for package in packages {
            let mut unpack = Command::new("dpkg");
            unpack.arg("-x").arg(package).arg(&partial);
            run(unpack, &self.log(), STEP_LIMIT)?;
            let _ = fs::remove_file(package);
        }
        Ok(partial)
    }

    /// Downloads the packages named by `arguments` and everything they need that is not installed.
    fn download(&self, arguments: &[&str]) -> Result<Vec<PathBuf>, String> {
        let archives = self.directory.join("cache/archives");
        for package in packages_in(&archives)? {
            let _ = fs::remove_file(package);
        }
        let install = ["install", "--yes", "--download-only", "--no-install-recommends"];
        self.apt_get(&[&install, arguments].concat())?;
        match packages_in(&archives)? {
            packages if packages.is_empty() => Err("apt-get downloaded no package".to_owned()),
            packages => Ok(packages),
        }
    }
}

fn packages_in(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths.filter(|path| path.extension().is_some_and(|extension| extension == "deb")).collect())
}

fn configuration(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        "Dir::State::Lists \"{directory}/lists\";\n\
         Dir::State::status \"{directory}/status\";\n\
         Dir::State::extended_states \"{directory}/extended_states\";\n\
         Dir::Cache \"{directory}/cache\";\n\
         Dir::Cache::archives \"{directory}/cache/archives\";\n\
         Dir::Log \"{directory}\";\n\
         Dir::Etc::SourceList \"/dev/null\";\n\
         Dir::Etc::SourceParts \"{directory}/sources\";\n\
         Dir::Etc::Preferences \"/dev/null\";\n\
         Dir::Etc::PreferencesParts \"{directory}/preferences\";\n\
         #clear APT::Update::Pre-Invoke;\n\
         #clear APT::Update::Post-Invoke;\n\
         #clear APT::Update::Post-Invoke-Success;\n\
         #clear APT::Default-Release;\n\
         #clear Acquire::IndexTargets::deb;\n\
         Acquire::IndexTargets::deb::Packages::MetaKey \"$(COMPONENT)/binary-$(ARCHITECTURE)/Packages\";\n\
         Acquire::IndexTargets::deb::Packages::flatMetaKey \"Packages\";\n\
         Acquire::IndexTargets::deb::Packages::ShortDescription \"Packages\";\n\
         Acquire::IndexTargets::deb::Packages::Description \"$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages\";\n\
         Acquire::IndexTargets::deb::Packages::Optional \"false\";\n\
         Acquire::Languages \"none\";\n\
         Acquire::Retries \"3\";\n\
         Acquire::http::Timeout \"30\";\n\
         Acquire::https::Timeout \"30\";\n\
         APT::Sandbox::User \"root\";\n\
         Debug::NoLocking \"true\";\n"
    )
}

/// The system's package state, reduced to names, versions and what is provided.
///
/// Without dependencies and conflicts of installed packages apt cannot refuse because of them, and without QEMU's own
/// packages it downloads those too. What is installed on this machine is not downloaded again.
fn private_status(status: &str) -> String {
    let mut reduced = String::new();
    for paragraph in status.split("\n\n") {
        let field =
            |name: &str| paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        let Some(package) = field("Package") else { continue };
        let ours = package.starts_with("qemu") || ["seabios", "ipxe-qemu"].contains(&package);
        if ours || field("Status") != Some("install ok installed") {
            continue;
        }
        for name in ["Package", "Status", "Architecture", "Multi-Arch", "Version", "Provides"] {
            if let Some(value) = field(name) {
                reduced.push_str(&format!("{name}: {value}\n"));
            }
        }
        reduced.push('\n');
    }
    reduced
}

/// apt sources in both formats they are written in.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sources {
    one_line: String,
    deb822: String,
}

impl Sources {
    fn of_this_machine() -> Result<Self, String> {
        let mut sources = Self::default();
        let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
        if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
            paths.extend(entries.flatten().map(|entry| entry.path()));
        }
        paths.sort();
        for path in paths {
            let into = match path.extension().and_then(|extension| extension.to_str()) {
                Some("list") => &mut sources.one_line,
                Some("sources") => &mut sources.deb822,
                _ => continue,
            };
            if let Ok(text) = fs::read_to_string(&path) {
                into.push_str(&text);
                into.push_str("\n\n");
            }
        }
        match sources.is_empty() {
            true => Err("no apt sources below /etc/apt".to_owned()),
            false => Ok(sources),
        }
    }

    fn is_empty(&self) -> bool {
        self.one_line.trim().is_empty() && self.deb822.trim().is_empty()
    }

    /// The binary sources of `codename` and its sub-suites, and the backports beside each source of the release itself.
    fn for_release(&self, codename: &str) -> Self {
        let backports = format!("{codename}-backports");
        let of_release = |suite: &str| suite == codename || suite.starts_with(&format!("{codename}-"));
        let mut derived = Self::default();
        for line in self.one_line.lines() {
            let Some((head, suite, components)) = split_one_line(line) else { continue };
            if of_release(suite) && suite != backports {
                derived.one_line.push_str(&format!("{head} {suite} {components}\n"));
            }
            if suite == codename {
                derived.one_line.push_str(&format!("{head} {backports} {components}\n"));
            }
        }
        for stanza in stanzas(&self.deb822) {
            let field = |name: &str| {
                stanza.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map_or("", |(_, value)| value.as_str())
            };
            let binary = field("Types").split_whitespace().any(|kind| kind == "deb");
            if !binary || ["no", "false", "0", "off"].contains(&field("Enabled").trim()) {
                continue;
            }
            let mut suites: Vec<&str> = field("Suites").split_whitespace().filter(|suite| of_release(suite)).collect();
            suites.retain(|&suite| suite != backports);
            if suites.is_empty() {
                continue;
            }
            if suites.contains(&codename) {
                suites.push(&backports);
            }
            for (key, value) in &stanza {
                match key.to_ascii_lowercase().as_str() {
                    "types" => derived.deb822.push_str("Types: deb\n"),
                    "suites" => derived.deb822.push_str(&format!("Suites: {}\n", suites.join(" "))),
                    _ => derived.deb822.push_str(&format!("{key}:{value}\n")),
                }
            }
            derived.deb822.push('\n');
        }
        derived
    }

    /// The same mirrors, with the suites of `release` in the place of those of [`RELEASE`].
    ///
    /// `self` has been through [`Self::for_release`].
    fn moved_to(&self, release: &str) -> Self {
        let moved = |suite: &str| match suite.strip_prefix(RELEASE) {
            Some(part) => format!("{release}{part}"),
            None => suite.to_owned(),
        };
        let mut other = Self::default();
        for line in self.one_line.lines() {
            let Some((head, suite, components)) = split_one_line(line) else { continue };
            other.one_line.push_str(&format!("{head} {} {components}\n", moved(suite)));
        }
        for line in self.deb822.lines() {
            match line.strip_prefix("Suites:") {
                Some(suites) => {
                    let suites: Vec<String> = suites.split_whitespace().map(moved).collect();
                    other.deb822.push_str(&format!("Suites: {}\n", suites.join(" ")));
                }
                None => other.deb822.push_str(&format!("{line}\n")),
            }
        }
        other
    }
}

/// Splits `deb [options] uri suite components` before and after the suite.
fn split_one_line(line: &str) -> Option<(&str, &str, &str)> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let rest = line.strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t']) {
        return None;
    }
    let after_options = match rest.trim_start().strip_prefix('[') {
        Some(options) => options.split_once(']')?.1,
        None => rest,
    };
    let (_uri, after_uri) = after_options.trim_start().split_once(char::is_whitespace)?;
    let (suite, components) = after_uri.trim_start().split_once(char::is_whitespace)?;
    let head = &line[..line.len() - after_uri.len()];
    Some((head.trim_end(), suite, components.trim()))
}

/// The stanzas of a deb822 file as lists of (field, value), values with their continuation lines.
fn stanzas(text: &str) -> Vec<Vec<(String, String)>> {
    let mut stanzas = vec![Vec::<(String, String)>::new()];
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let current = stanzas.last_mut().expect("never empty: it starts with one and only grows");
        if line.trim().is_empty() {
            stanzas.push(Vec::new());
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = current.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((key, value)) = line.split_once(':') {
            current.push((key.to_owned(), value.to_owned()));
        }
    }
    stanzas.retain(|stanza| !stanza.is_empty());
    stanzas
}

/// Directories below `prefix` that hold shared libraries, also the private ones that packages keep one level down.
fn library_directories(prefix: &Path) -> Vec<PathBuf> {
    let below = |directory: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
        entries.filter(|path| path.is_dir()).collect()
    };
    let holds_libraries = |directory: &PathBuf| {
        let mut entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("lib") && name.contains(".so")
        })
    };
    let mut found = Vec::new();
    for lib in ["usr/lib", "lib"] {
        for architecture in below(&prefix.join(lib)) {
            if architecture.to_string_lossy().ends_with("-linux-gnu") {
                let private = below(&architecture).into_iter().filter(holds_libraries);
                let private: Vec<PathBuf> = private.collect();
                found.push(architecture);
                found.extend(private);
            }
        }
    }
    found
}

/// Runs `command` to its end, or kills it when `limit` is over; its output goes to `log`.
fn run(mut command: Command, log: &Path, limit: Duration) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let text = |error: io::Error| format!("{name}: {error}");
    let output = File::create(log).map_err(text)?;
    command.stdin(Stdio::null()).stdout(output.try_clone().map_err(text)?).stderr(output);
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    let mut child = command.spawn().map_err(text)?;
    let deadline = Instant::now() + limit;
    loop {
        match child.try_wait().map_err(text)? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(format!("{name} ended with {status}: {}", last_lines(log))),
            None if Instant::now() >= deadline => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{name} not finished after {limit:?}: {}", last_lines(log)));
            }
            // The standard library cannot wait for a process with a limit.
            None => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The end of a log in one line.
pub(crate) fn last_lines(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(1200)..]).into_owned();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(6)..].join(" | ")
}

const BINARY: &str = "usr/bin/qemu-system-x86_64";
const DPKG_STATUS: &str = "/var/lib/dpkg/status";
/// The dynamic loader of a prefix that has its own C library.
const LOADER: &str = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";
const RELEASE: &str = "bookworm";
/// Its backports have QEMU 11.1.
const NEXT_RELEASE: &str = "trixie";
/// One apt or dpkg step; 60 MB have to come through in this time.
const STEP_LIMIT: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use super::*;

    fn one_line(text: &str) -> String {
        let sources = Sources { one_line: text.to_owned(), deb822: String::new() };
        sources.for_release("bookworm").one_line
    }

    fn deb822(text: &str) -> String {
        let sources = Sources { one_line: String::new(), deb822: text.to_owned() };
        sources.for_release("bookworm").deb822
    }

    #[test]
    fn a_one_line_source_keeps_mirror_and_options_and_gains_backports() {
        assert_eq!(
            one_line(
                "deb [ arch=amd64 signed-by=/k.gpg ] https://mirror.example/debian bookworm main contrib # note\n"
            ),
            "deb [ arch=amd64 signed-by=/k.gpg ] https://mirror.example/debian bookworm main contrib\n\
             deb [ arch=amd64 signed-by=/k.gpg ] https://mirror.example/debian bookworm-backports main contrib\n"
        );
    }

    #[test]
    fn one_line_sources_of_others_are_left_out() {
        let text = "# deb http://m/debian bookworm main\ndeb-src http://m/debian bookworm main\n\
                    deb http://m/node nodistro main\ndeb\n";
        assert_eq!(one_line(text), "");
    }

    #[test]
    fn a_security_source_gains_no_backports() {
        let line = "deb http://m/debian-security bookworm-security main\n";
        assert_eq!(one_line(line), line);
    }

    #[test]
    fn backports_that_are_there_already_are_not_named_twice() {
        let text = "deb http://m/debian bookworm main\ndeb http://m/debian bookworm-backports main\n";
        assert_eq!(one_line(text), text);
        let text = "Types: deb\nURIs: http://m/debian\nSuites: bookworm bookworm-backports\nComponents: main\n\n";
        assert_eq!(deb822(text), text);
    }

    #[test]
    fn a_deb822_source_keeps_its_key_and_gains_backports() {
        let text = "# comment\nTypes: deb deb-src\nURIs: http://m/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By:\n -----BEGIN\n .\n -----END\n";
        assert_eq!(
            deb822(text),
            "Types: deb\nURIs: http://m/debian\nSuites: bookworm bookworm-updates bookworm-backports\n\
             Components: main\nSigned-By:\n -----BEGIN\n .\n -----END\n\n"
        );
    }

    #[test]
    fn sources_of_the_next_release_are_those_of_this_one_with_other_suites() {
        let one_line = "deb [signed-by=/bookworm.gpg] https://bookworm.example/debian bookworm main\n\
                        deb http://m/debian-security bookworm-security main\n";
        let deb822 = "Types: deb\nURIs: http://m/debian\nSuites: bookworm bookworm-updates\nComponents: main\n";
        let sources = Sources { one_line: one_line.to_owned(), deb822: deb822.to_owned() };
        let moved = sources.for_release(RELEASE).moved_to(NEXT_RELEASE);
        assert_eq!(
            moved.one_line,
            "deb [signed-by=/bookworm.gpg] https://bookworm.example/debian trixie main\n\
             deb [signed-by=/bookworm.gpg] https://bookworm.example/debian trixie-backports main\n\
             deb http://m/debian-security trixie-security main\n"
        );
        assert_eq!(
            moved.deb822,
            "Types: deb\nURIs: http://m/debian\nSuites: trixie trixie-updates trixie-backports\nComponents: main\n\n"
        );
    }

    #[test]
    fn disabled_and_foreign_deb822_sources_are_left_out() {
        let disabled = "Enabled: no\nTypes: deb\nURIs: http://m\nSuites: bookworm\nComponents: main\n";
        let foreign = "Types: deb\nURIs: http://m\nSuites: nodistro\nComponents: main\n";
        let source = "Types: deb-src\nURIs: http://m\nSuites: bookworm\nComponents: main\n";
        assert_eq!(deb822(&[disabled, foreign, source].join("\n")), "");
    }

    #[test]
    fn the_private_status_knows_what_is_installed_but_no_qemu_and_no_dependencies() {
        let status = "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nMulti-Arch: same\n\
                      Version: 2.36-9\nDepends: libgcc-s1\nDescription: x\n long\n\n\
                      Package: qemu-utils\nStatus: install ok installed\nVersion: 1\n\n\
                      Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n";
        assert_eq!(
            private_status(status),
            "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nMulti-Arch: same\n\
             Version: 2.36-9\n\n"
        );
    }

    #[test]
    fn a_command_that_takes_too_long_is_killed() {
        let dir = test_support::TempDir::new().unwrap();
        let mut command = Command::new("sleep");
        command.arg("1000");
        let error = run(command, &dir.join("log"), Duration::from_millis(50)).unwrap_err();
        assert!(error.contains("not finished after 50ms"), "{error}");
    }

    #[test]
    fn a_command_that_fails_shows_the_end_of_its_output() {
        let dir = test_support::TempDir::new().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2; exit 3"]);
        let error = run(command, &dir.join("log"), Duration::from_secs(20)).unwrap_err();
        assert!(error.ends_with("one | two"), "{error}");
    }
}
