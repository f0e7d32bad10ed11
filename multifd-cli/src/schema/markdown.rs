//! The schemas as a page for people.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// The page, in Markdown.
pub fn page() -> String {
    let mut page = HEAD.to_owned();
    let mut parts = BTreeMap::new();
    for (verb, schema) in super::all() {
        let title = if verb == "other" { "Other verbs, and errors of the command line" } else { verb };
        page.push_str(&format!("\n## {title}\n\n{}", table(&schema)));
        if let Some(Value::Object(definitions)) = schema.get("$defs") {
            parts.extend(definitions.iter().map(|(name, part)| (name.clone(), part.clone())));
        }
    }
    page.push_str("\n## Parts\n");
    for (name, part) in &parts {
        page.push_str(&format!("\n### {}\n\n{}", words(name), described(part)));
    }
    page
}

fn described(part: &Value) -> String {
    let text = part.get("description").and_then(Value::as_str).unwrap_or_default();
    let choices: Vec<String> = part
        .get("oneOf")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|choice| format!("- `{}`: {}\n", choice["const"].as_str().unwrap_or_default(), one_line(choice)))
        .collect();
    if choices.is_empty() {
        format!("{}\n\n{}", text.trim(), table(part))
    } else {
        format!("{text}\n\n{}", choices.concat())
    }
}

/// A row for each field.
fn table(schema: &Value) -> String {
    let empty = Map::new();
    let fields = schema.get("properties").and_then(Value::as_object).unwrap_or(&empty);
    let required: Vec<&str> =
        schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    let on_success: Vec<&str> = schema
        .pointer("/then/required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let mut out = "| field | type | there | what |\n|---|---|---|---|\n".to_owned();
    for (name, field) in fields {
        let there = match (required.contains(&name.as_str()), on_success.contains(&name.as_str())) {
            (true, _) => "always",
            (_, true) => "if completed",
            _ => "",
        };
        out.push_str(&format!("| `{name}` | {} | {there} | {} |\n", type_of(field), one_line(field)));
    }
    out
}

fn type_of(field: &Value) -> String {
    if let Some(name) = reference(field) {
        return format!("[{}](#{})", words(&name), words(&name).replace(' ', "-"));
    }
    let types: Vec<&str> = match field.get("type") {
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(several)) => {
            several.iter().filter_map(Value::as_str).filter(|name| *name != "null").collect()
        }
        _ => Vec::new(),
    };
    match (types.as_slice(), field.get("items")) {
        (["array"], Some(items)) => format!("list of {}", type_of(items)),
        ([], _) => "any".to_owned(),
        (types, _) => types.join(" or "),
    }
}

fn reference(field: &Value) -> Option<String> {
    let direct = field.get("$ref").and_then(Value::as_str);
    let in_choice = || field.get("anyOf")?.as_array()?.iter().find_map(|choice| choice.get("$ref")?.as_str());
    direct.or_else(in_choice).and_then(|path| path.rsplit('/').next()).map(str::to_owned)
}

fn one_line(field: &Value) -> String {
    let text = field.get("description").and_then(Value::as_str).unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// `RamReport` as `ram report`.
fn words(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push(' ');
        }
        out.extend(c.to_lowercase());
    }
    out
}

const HEAD: &str = "\
<!-- Made by `cargo xtask json` from the types that are printed; changes belong there. -->

# Reports as JSON

With `--json` a verb prints one JSON object to stdout, also where it fails. `multifd schema VERB` prints its JSON schema.

Names of QMP's `query-migrate` have QMP's types: integers, in milliseconds, bytes or pages. What is finer has a name of ours:
names that end in `-us` are whole microseconds, and a fraction is named as one below (`number`). A field that does not apply is not there.
Readers should ignore fields that they do not know.

The exit status says which kind of end it was: 0 done, 1 failed, 2 usage, 3 cancelled, 4 the peer broke the protocol or does not match,
5 did not converge, 6 memory has wrong contents, 7 in doubt, 8 the VM is at the destination but incomplete.
";
