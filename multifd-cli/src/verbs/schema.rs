//! `multifd schema`: the JSON schema of the reports.

use serde_json::Map;

use crate::{args::SchemaArgs, exit::Exit, report::Outcome, schema};

/// Prints the schema of one verb's report, or of all.
pub fn run(args: &SchemaArgs) -> Outcome {
    if args.markdown {
        return Outcome::done(Map::new(), schema::page());
    }
    let value = match args.verb.as_deref() {
        None => schema::together(),
        Some(verb) => match schema::of(verb) {
            Some(schema) => schema,
            None => {
                let known: Vec<&str> = schema::all().iter().map(|(name, _)| *name).collect();
                let message = format!("{verb:?} has no report; expected one of {}", known.join(", "));
                return Outcome::failed(Exit::Usage, message);
            }
        },
    };
    Outcome::done(Map::new(), format!("{value:#}\n"))
}
