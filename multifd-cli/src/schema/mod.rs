//! JSON schemas of what the verbs print with `--json`, and a page of documentation made from them.

mod markdown;
mod reports;

use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

pub use self::markdown::page;
use crate::report::MigrationReport;

/// The verbs that have a report, with the schema of each.
pub fn all() -> Vec<(&'static str, Value)> {
    VERBS.iter().map(|(name, of)| (*name, of())).collect()
}

/// The schema of what `verb` prints; `None` where it prints no report.
pub fn of(verb: &str) -> Option<Value> {
    VERBS.iter().find(|(name, _)| *name == verb).map(|(_, of)| of())
}

/// A verb, and what makes the schema of its report.
type OfVerb = (&'static str, fn() -> Value);

const VERBS: &[OfVerb] = &[
    ("demo", migrates::<reports::Demo>),
    ("guest", plain::<reports::Guest>),
    ("receive", migrates::<reports::Receive>),
    ("send", migrates::<reports::Send>),
    ("serve", plain::<reports::Serve>),
    ("checkpoint", migrates::<reports::Checkpoint>),
    ("restore", migrates::<reports::Restore>),
    ("convert", plain::<reports::Convert>),
    ("give-back", plain::<reports::GiveBack>),
    ("inspect", plain::<reports::Inspect>),
    ("doctor", plain::<reports::Doctor>),
    ("tls-init", plain::<reports::TlsInit>),
    ("other", plain::<reports::Other>),
];

fn generator() -> SchemaGenerator {
    SchemaSettings::draft2020_12().into_generator()
}

fn plain<T: JsonSchema>() -> Value {
    generator().into_root_schema_for::<T>().to_value()
}

/// The same of a verb that migrates: it has all figures where the migration came to its end.
fn migrates<T: JsonSchema>() -> Value {
    let migration: Schema = generator().into_root_schema_for::<MigrationReport>();
    let required = migration.get("required").cloned().unwrap_or_default();
    let mut schema = plain::<T>();
    let completed = json!({ "properties": { "status": { "const": "completed" } } });
    if let Value::Object(schema) = &mut schema {
        schema.insert("if".to_owned(), completed);
        schema.insert("then".to_owned(), json!({ "required": required }));
    }
    schema
}

/// One object with the schema of each verb.
pub fn together() -> Value {
    Value::Object(all().into_iter().map(|(verb, schema)| (verb.to_owned(), schema)).collect::<Map<_, _>>())
}
