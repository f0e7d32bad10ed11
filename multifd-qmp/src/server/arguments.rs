//! The arguments of a command, taken one by one; what is left over is refused, in QEMU's words.

use serde_json::{Map, Value};

use super::CommandError;

/// The arguments of a command.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Arguments {
    map: Map<String, Value>,
}

impl Arguments {
    pub(super) fn new(map: Map<String, Value>) -> Arguments {
        Arguments { map }
    }

    /// Takes the text called `name`.
    ///
    /// # Errors
    /// It is something else.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, CommandError> {
        match self.map.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong_type(name, "string")),
        }
    }

    /// Takes the truth value called `name`.
    ///
    /// # Errors
    /// It is something else.
    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, CommandError> {
        match self.map.remove(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(_) => Err(wrong_type(name, "boolean")),
        }
    }

    /// Takes the number called `name`, which is a whole one and not below zero.
    ///
    /// # Errors
    /// It is something else.
    pub fn number(&mut self, name: &str) -> Result<Option<u64>, CommandError> {
        match self.map.remove(name) {
            None => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or_else(|| expects(name, "uint64")),
        }
    }

    /// Takes the list called `name`.
    ///
    /// # Errors
    /// It is something else.
    pub fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, CommandError> {
        match self.map.remove(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(_) => Err(wrong_type(name, "array")),
        }
    }

    /// Takes all that is left.
    pub fn rest(&mut self) -> Map<String, Value> {
        std::mem::take(&mut self.map)
    }

    /// Ends the taking.
    ///
    /// # Errors
    /// Something is left.
    pub fn end(self) -> Result<(), CommandError> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(name) => Err(CommandError::generic(format!("Parameter '{name}' is unexpected"))),
        }
    }

    /// The error of a command without the argument `name`.
    pub fn missing(name: &str) -> CommandError {
        CommandError::generic(format!("Parameter '{name}' is missing"))
    }
}

impl From<Map<String, Value>> for Arguments {
    fn from(map: Map<String, Value>) -> Arguments {
        Arguments { map }
    }
}

fn wrong_type(name: &str, expected: &str) -> CommandError {
    CommandError::generic(format!("Invalid parameter type for '{name}', expected: {expected}"))
}

fn expects(name: &str, expected: &str) -> CommandError {
    CommandError::generic(format!("Parameter '{name}' expects {expected}"))
}
