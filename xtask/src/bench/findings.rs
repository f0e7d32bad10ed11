//! What a section found: text for the page, files beside it, and the raw figures.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// The result of one section.
#[derive(Default)]
pub struct Findings {
    /// Markdown, without the heading.
    pub text: String,
    /// Files beside it, by name: plots, and the table for the README.
    pub files: Vec<(String, String)>,
    /// Every single measurement.
    pub raw: Value,
}

impl Findings {
    /// Adds a paragraph.
    pub fn say(&mut self, paragraph: &str) {
        self.text.push_str(paragraph);
        self.text.push_str("\n\n");
    }

    /// Adds a table. The first column is text, all others are figures.
    pub fn table(&mut self, head: &[&str], rows: &[Vec<String>]) {
        self.text.push_str(&markdown_table(head, rows));
        self.text.push('\n');
    }

    /// Adds a plot.
    pub fn plot(&mut self, name: &str, alt: &str, svg: String) {
        self.say(&format!("![{alt}](benchmarks/{name}.svg)"));
        self.files.push((format!("{name}.svg"), svg));
    }

    /// Keeps it below `directory`, for the page.
    pub fn store(&self, directory: &Path, section: &str) -> Result<(), String> {
        let write = |name: String, text: &str| {
            let path = directory.join(name);
            fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))
        };
        write(format!("{section}.md"), &self.text)?;
        write(format!("{section}.json"), &format!("{:#}\n", self.raw))?;
        self.files.iter().try_for_each(|(name, text)| write(name.clone(), text))
    }
}

/// A table in Markdown.
pub fn markdown_table(head: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: &[&str]| format!("| {} |\n", cells.join(" | "));
    let rule: Vec<&str> = (0..head.len()).map(|column| if column == 0 { "---" } else { "---:" }).collect();
    let mut table = line(head) + &line(&rule);
    for row in rows {
        let cells: Vec<&str> = row.iter().map(String::as_str).collect();
        table.push_str(&line(&cells));
    }
    table
}
