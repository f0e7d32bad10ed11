//! Parts of a report on a migration that not every migration has.

use multifd::{destination, source};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::table;

/// What a channel made of the choice to compress.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ChannelCompression {
    /// Which channel.
    pub channel: u8,
    /// Packets whose pages were sent as they are.
    pub packets_plain: u64,
    /// Packets whose pages were compressed.
    pub packets_compressed: u64,
    /// How often it changed from one way to the other, without trials.
    pub switches: u64,
    /// Bytes of guest memory for a byte that came out of the compressor.
    pub ratio: Option<f64>,
    /// Bytes of guest memory that the compressor took per second.
    pub compressor_bytes_per_second: Option<f64>,
    /// Bytes per second that the connection took when pages were last sent as they are.
    pub plain_bytes_per_second: Option<f64>,
    /// Whether it compressed in the end.
    pub compresses: bool,
    /// Why.
    pub reason: String,
}

impl ChannelCompression {
    /// The same in a sentence.
    pub fn text(&self) -> String {
        let packets = self.packets_plain + self.packets_compressed;
        format!(
            "channel {}: {} of {} packets compressed; {}",
            self.channel,
            table::grouped(self.packets_compressed),
            table::grouped(packets),
            self.reason
        )
    }
}

impl From<&source::ChannelCompression> for ChannelCompression {
    fn from(channel: &source::ChannelCompression) -> ChannelCompression {
        ChannelCompression {
            channel: channel.channel.0,
            packets_plain: channel.packets_plain,
            packets_compressed: channel.packets_compressed,
            switches: channel.switches,
            ratio: channel.ratio,
            compressor_bytes_per_second: channel.compressor_speed,
            plain_bytes_per_second: channel.plain_speed,
            compresses: channel.compresses,
            reason: channel.reason.clone(),
        }
    }
}

/// How the memory of one RAM block got its first content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FreshMemory {
    /// The name of the block.
    pub block: String,
    /// Bytes that went through private memory, and were put in place by the kernel.
    pub copied: u64,
    /// Bytes that were read into place.
    pub in_place: u64,
    /// CPU seconds for a GB the first way, when it was tried last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_cost: Option<f64>,
    /// The same of the second way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_place_cost: Option<f64>,
    /// Why most of it went the way it did, and what the host would have to be set to for the other one.
    pub reason: String,
}

impl From<&destination::FreshMemory> for FreshMemory {
    fn from(memory: &destination::FreshMemory) -> FreshMemory {
        FreshMemory {
            block: memory.block.as_str().to_owned(),
            copied: memory.copied,
            in_place: memory.in_place,
            copy_cost: memory.copy_cost,
            in_place_cost: memory.in_place_cost,
            reason: memory.reason.clone(),
        }
    }
}

/// How sending without copies went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ZeroCopy {
    /// System calls that were to send pages without a copy.
    pub sends: u64,
    /// Those of them whose pages were copied after all.
    pub copied: u64,
    /// Those of the copied ones for which the kernel had no room.
    pub no_room: u64,
    /// Why it was not possible at all, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

impl ZeroCopy {
    /// The same in a few words.
    pub fn text(&self) -> String {
        let ZeroCopy { sends, copied, no_room, refused } = self;
        let [sends_text, copied_text, no_room_text] = [sends, copied, no_room].map(|count| table::grouped(*count));
        match refused {
            Some(why) => format!("not possible here, pages were copied: {why}"),
            None if *no_room > 0 => format!(
                "{copied_text} of {sends_text} sends were copied, {no_room_text} of them for lack of room (ulimit -l, \
                 net.core.optmem_max)"
            ),
            None if *copied > 0 => format!(
                "{copied_text} of {sends_text} sends were copied by the kernel, as it does where the connection does not \
                 leave this machine"
            ),
            None => format!("{sends_text} sends, none of them copied"),
        }
    }
}

impl From<&source::ZeroCopy> for ZeroCopy {
    fn from(zero_copy: &source::ZeroCopy) -> ZeroCopy {
        let &source::ZeroCopy { sends, copied, no_room, .. } = zero_copy;
        ZeroCopy { sends, copied, no_room, refused: zero_copy.refused.clone() }
    }
}

/// What watching the rounds of all writes found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Audit {
    /// Writes that came from an older round than the page already held.
    pub stale_writes: u64,
    /// The first of them, in words.
    pub first: Vec<String>,
}

impl Audit {
    /// The same in a sentence.
    pub fn text(&self) -> String {
        match self.first.first() {
            None => "audit: no page was written from an older round than it held".to_owned(),
            Some(first) => {
                format!(
                    "audit: {} pages were written from an older round than they held, first {first}",
                    self.stale_writes
                )
            }
        }
    }
}

impl From<&destination::Findings> for Audit {
    fn from(findings: &destination::Findings) -> Audit {
        let first = findings.first.iter().map(ToString::to_string).collect();
        Audit { stale_writes: findings.stale_writes, first }
    }
}
