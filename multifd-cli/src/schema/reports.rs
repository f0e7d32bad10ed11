//! The reports of the verbs, as types: what each verb prints is one of these, with fields left out that do not apply.

use schemars::JsonSchema;
use serde_json::Value;

use crate::{
    doctor::Check,
    report::MigrationReport,
    verbs::{Account, Compared, PostcopyReport, Verified},
};

/// How it ended; the only part of the report that is always there.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
#[expect(dead_code, reason = "types for the schema")]
pub(super) struct Ending {
    /// In the words of QMP's `query-migrate`.
    pub status: Status,
    /// Why it is not `completed`.
    pub error: Option<String>,
    /// It is not known which side has the guest; it is paused here (exit status 7).
    pub in_doubt: Option<bool>,
    /// The VM is at the destination, which lacks a part of its memory (exit status 8).
    pub incomplete: Option<bool>,
}

/// How it ended.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
#[expect(dead_code, reason = "types for the schema")]
pub(super) enum Status {
    /// Well.
    Completed,
    /// It was cancelled by a signal or a command.
    Cancelled,
    /// Not well; `error` says why, and the exit status which kind it was.
    Failed,
}

macro_rules! report {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(JsonSchema)]
        #[schemars(rename_all = "kebab-case", deny_unknown_fields)]
        #[expect(dead_code, reason = "types for the schema")]
        pub(super) struct $name {
            #[schemars(flatten)]
            pub ending: Ending,
            $($(#[$field_doc])* pub $field: $type,)*
        }
    };
}

report! {
    /// The report of `multifd demo`.
    Demo {
        /// What writes the memory: `kvm` or `process`.
        guest: Option<String>,
        /// Why it is that.
        guest_reason: Option<String>,
        /// What tracks the writes: `kvm-dirty-log`, `kvm-dirty-ring`, `uffd-wp` or `bitmap`.
        dirty_log: Option<String>,
        /// Why it is that.
        dirty_log_reason: Option<String>,
        #[schemars(flatten)]
        migration: Option<MigrationReport>,
        /// Whether the memory is what it was, and the guest goes on.
        verified: Option<Verified>,
        #[schemars(flatten)]
        account: Option<Account>,
    }
}

report! {
    /// The report of `multifd guest`.
    Guest {
        /// What writes the memory: `kvm` or `process`.
        guest: Option<String>,
        /// Why it is that.
        guest_reason: Option<String>,
        /// What tracks the writes: `kvm-dirty-log`, `kvm-dirty-ring`, `uffd-wp` or `bitmap`.
        dirty_log: Option<String>,
        /// Why it is that.
        dirty_log_reason: Option<String>,
        #[schemars(flatten)]
        migration: Option<MigrationReport>,
        #[schemars(flatten)]
        account: Option<Account>,
        #[schemars(flatten)]
        compared: Option<Compared>,
    }
}

report! {
    /// The report of `multifd receive`.
    Receive {
        #[schemars(flatten)]
        migration: Option<MigrationReport>,
        #[schemars(flatten)]
        received: Received,
    }
}

/// What a receiver adds.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
#[expect(dead_code, reason = "types for the schema")]
pub(super) struct Received {
    /// The machine type of the VM.
    pub machine: Option<String>,
    /// How the state came.
    pub mode: Option<Mode>,
    /// From when the state is.
    pub instant: Option<Instant>,
    /// How often the source went on over new connections, after a switch to postcopy.
    pub recoveries: Option<u64>,
    /// The file.
    pub checkpoint: Option<File>,
    /// The file is complete, though the migration failed: the source may not know it.
    pub published: Option<bool>,
    /// What is missing of this report, and why; the checkpoint is complete.
    pub report_incomplete: Option<String>,
    /// The RAM blocks.
    pub ram_blocks: Option<Vec<RamBlock>>,
    /// RAM blocks whose memory is not here, where there are any: this is not a whole VM.
    pub memory_elsewhere: Option<Vec<String>>,
    /// The devices.
    pub devices: Option<Vec<Device>>,
}

/// How the state of a VM came.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
#[expect(dead_code, reason = "types for the schema")]
pub(super) enum Mode {
    /// In rounds while the guest ran, the rest while it was paused.
    Live,
    /// As a background snapshot.
    Snapshot,
    /// In rounds while the guest ran, then the devices, then what was missing.
    Postcopy,
    /// As `live`, from a pipe or a file.
    Stream,
}

/// From when the state is.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
#[expect(dead_code, reason = "types for the schema")]
pub(super) enum Instant {
    /// The end of the migration.
    Switchover,
    /// Its beginning.
    Start,
}

/// A file.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case", deny_unknown_fields)]
#[expect(dead_code, reason = "types for the schema")]
pub(super) struct File {
    /// Its name.
    pub path: String,
    /// Its length.
    pub bytes: Option<u64>,
    /// What it takes on disk.
    pub disk_bytes: Option<u64>,
    /// What it is: `checkpoint`, `stream`, `libvirt-image` or words of that kind.
    pub kind: Option<String>,
    /// Where the migration stream begins in it.
    pub stream_offset: Option<u64>,
}

/// The state of one device that came in packets on channels.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case", deny_unknown_fields)]
#[expect(dead_code, reason = "types for the schema")]
pub(super) struct PacketedDevice {
    /// The name of its section.
    pub name: String,
    /// The instance.
    pub instance: u32,
    /// Packets.
    pub packets: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
}

/// A RAM block.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case", deny_unknown_fields)]
#[expect(dead_code, reason = "types for the schema")]
pub(super) struct RamBlock {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Pages.
    pub pages: u64,
    /// Pages with content.
    pub normal: u64,
    /// Pages of zeros.
    pub zero: u64,
    /// Its memory is not here, and nothing is known of its pages: it is in a file that the QEMU shared (`x-ignore-shared`).
    pub elsewhere: Option<bool>,
    /// SHA-256 of all its bytes, where it was asked for and they are here.
    pub digest: Option<String>,
}

/// The state of a device.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case", deny_unknown_fields)]
#[expect(dead_code, reason = "types for the schema")]
pub(super) struct Device {
    /// Its name in the stream.
    pub name: String,
    /// Which of those of that name.
    pub instance: u32,
    /// The version of its format.
    pub version: u32,
    /// Bytes of its state.
    pub bytes: u64,
    /// It was sent before the pages.
    pub early: Option<bool>,
    /// Its fields, where they were asked for.
    pub fields: Option<Value>,
}

report! {
    /// The report of `multifd send`.
    Send {
        #[schemars(flatten)]
        migration: Option<MigrationReport>,
        #[schemars(flatten)]
        sent: Sent,
    }
}

report! {
    /// The report of `multifd serve` on one client: an object for each, a line each.
    Serve {
        #[schemars(flatten)]
        migration: Option<MigrationReport>,
        #[schemars(flatten)]
        sent: Sent,
        /// Which client, counted in the order of their connections.
        client: Option<u64>,
        /// Where it connected from.
        peer: Option<String>,
    }
}

/// What a sender adds.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case")]
#[expect(dead_code, reason = "types for the schema")]
pub(super) struct Sent {
    /// The machine type of the VM.
    pub machine: Option<String>,
    /// Where pages of zeros were named: `multifd`, `legacy` or `none`.
    pub zero_pages: Option<String>,
    /// The figures of a postcopy.
    pub postcopy: Option<PostcopyReport>,
    /// The file from which `--recover` goes on.
    pub state: Option<String>,
}

report! {
    /// The report of `multifd checkpoint`.
    Checkpoint {
        #[schemars(flatten)]
        migration: Option<MigrationReport>,
        #[schemars(flatten)]
        received: Received,
        /// The QEMU.
        qemu: Option<Qemu>,
        /// The run state of the guest in the QEMU at the end.
        guest_state: Option<String>,
    }
}

report! {
    /// The report of `multifd restore`.
    Restore {
        #[schemars(flatten)]
        migration: Option<MigrationReport>,
        #[schemars(flatten)]
        sent: Sent,
        /// The QEMU.
        qemu: Option<Qemu>,
        /// The run state of the guest in the QEMU at the end.
        guest_state: Option<String>,
        /// `qmp`: the answer on the connection was lost, and the QEMU says so on its monitor.
        confirmed_by: Option<String>,
    }
}

/// A QEMU.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case", deny_unknown_fields)]
#[expect(dead_code, reason = "types for the schema")]
pub(super) struct Qemu {
    /// Its version.
    pub version: String,
    /// Its machine type.
    pub machine: String,
    /// What runs the guest.
    pub accelerator: String,
    /// Bytes of memory, where it says so.
    pub memory: Option<u64>,
}

report! {
    /// The report of `multifd convert`.
    Convert {
        /// What was read.
        input: Option<File>,
        /// What was written.
        output: Option<File>,
        /// The machine type of the VM.
        machine: Option<String>,
        /// The RAM blocks.
        ram_blocks: Option<Vec<RamBlock>>,
        /// RAM blocks whose memory is not here, where there are any: this is not a whole VM.
        memory_elsewhere: Option<Vec<String>>,
        /// What is missing of this report, and why.
        report_incomplete: Option<String>,
        /// In milliseconds.
        total_time: Option<u64>,
    }
}

report! {
    /// The report of `multifd give-back`.
    GiveBack {
        /// RAM blocks that the source was told of.
        blocks: Option<u64>,
    }
}

report! {
    /// The report of `multifd tls-init`.
    TlsInit {
        /// The directory that was made.
        dir: Option<String>,
        /// The hosts that the certificate of destinations is for.
        hosts: Option<Vec<String>>,
        /// The last day on which the certificates are valid.
        valid_until: Option<String>,
    }
}

report! {
    /// The report of `multifd doctor`.
    Doctor {
        /// What was looked at, in the order of the text.
        checks: Option<Vec<Check>>,
        /// How many of them are warnings.
        warnings: Option<u64>,
        /// How many could not be looked at.
        not_known: Option<u64>,
    }
}

report! {
    /// The report of `multifd inspect`.
    Inspect {
        /// `checkpoint`, `libvirt-image`, or which kind of stream.
        kind: Option<String>,
        /// Of a libvirt save image: the kind of its content.
        content: Option<String>,
        /// Its name.
        path: Option<String>,
        /// Bytes of the file.
        bytes: Option<u64>,
        /// What it takes on disk.
        disk_bytes: Option<u64>,
        /// The header of a libvirt save image.
        libvirt: Option<Libvirt>,
        /// The machine type.
        machine: Option<String>,
        /// Bytes in a page.
        page_size: Option<u64>,
        /// Capabilities that the stream names.
        capabilities: Option<Vec<String>>,
        /// The VM's UUID.
        uuid: Option<String>,
        /// The UUID that the channels name.
        channel_uuid: Option<String>,
        /// The RAM blocks.
        ram_blocks: Option<Vec<RamBlock>>,
        /// RAM blocks whose memory is not here, where there are any: this is not a whole VM.
        memory_elsewhere: Option<Vec<String>>,
        /// Devices of which a part of the state came in packets on channels, where there are any: only a way with channels carries it.
        packeted_devices: Option<Vec<PacketedDevice>>,
        /// Bytes of device state.
        device_state_bytes: Option<u64>,
        /// SHA-256 of it, where it was asked for.
        device_state_digest: Option<String>,
        /// Bytes of its description.
        vmdescription_bytes: Option<u64>,
        /// The device state is exactly what its description says.
        devices_cut: Option<bool>,
        /// Why it is not.
        devices_problem: Option<String>,
        /// The devices.
        devices: Option<Vec<Device>>,
        /// The source opened a return path.
        return_path: Option<bool>,
        /// The commands on main, in words.
        commands: Option<Vec<String>>,
        /// Commands that are not listed.
        commands_left_out: Option<u64>,
        /// The stream has its end.
        complete: Option<bool>,
        /// How the state comes.
        mode: Option<Mode>,
        /// The figures of a switch to postcopy.
        postcopy: Option<Value>,
        /// Where rounds end on main: `per-round` or `per-section`.
        dialect: Option<String>,
        /// Where pages of zeros are named.
        zero_pages: Option<String>,
        /// Counts of main.
        main: Option<Value>,
        /// Counts of each channel.
        channels: Option<Vec<Value>>,
        /// Counts of each round.
        rounds: Option<Vec<Value>>,
        /// Rounds that are not listed.
        rounds_left_out: Option<u64>,
        /// Pages that came twice in one round.
        pages_repeated_in_round: Option<u64>,
        /// Pages that came in several rounds.
        pages_sent_again: Option<u64>,
        /// The first rule that was broken, with connection and offset.
        broken_rule: Option<Value>,
    }
}

/// The header of a libvirt save image.
#[derive(JsonSchema)]
#[schemars(rename_all = "kebab-case", deny_unknown_fields)]
#[expect(dead_code, reason = "types for the schema")]
pub(super) struct Libvirt {
    /// Of its format.
    pub version: u32,
    /// How the stream is packed.
    pub format: String,
    /// The domain ran when it was saved.
    pub was_running: bool,
    /// Its name.
    pub domain: Option<String>,
    /// Bytes of the description of the domain.
    pub xml_bytes: u64,
    /// Bytes of what libvirt keeps for itself.
    pub cookie_bytes: u64,
    /// Where the migration stream begins.
    pub stream_offset: u64,
}

report! {
    /// The end of a verb without a report of its own, and of a command line that makes no sense.
    Other {}
}
