//! What the proofs for any number of channels leave out is not left out by accident: each variant of the model is one of theirs.

use std::collections::BTreeSet;

use multifd_model::{
    devices::variants::devices_done_wrong,
    variants::{late_channels, removals},
};

const ROUND_LAW: &str = include_str!("../../proof/round_law_variants.py");
const DEVICE_STATE: &str = include_str!("../../proof/device_state_law_variants.py");

/// By the name of each row, whether it is said to do no harm.
fn proved(variants: &str) -> Vec<(String, bool)> {
    let variants = variants.split("    Variant(").skip(1);
    variants
        .map(|text| {
            let name = text.split('"').nth(1).unwrap_or_else(|| panic!("no name in {text}"));
            (name.to_owned(), text.contains("harmless="))
        })
        .collect()
}

#[test]
fn each_variant_of_the_model_is_one_of_the_proofs_with_the_same_verdict() {
    let bounded: Vec<(String, bool)> = removals()
        .into_iter()
        .chain(late_channels().into_iter().filter(|variant| variant.expected.is_some()))
        .map(|variant| (variant.name.to_owned(), variant.expected.is_none()))
        .collect();
    // Two rows have the same name, in both tables.
    let unbounded: Vec<_> = proved(ROUND_LAW).into_iter().filter(|(name, _)| !name.starts_with('[')).collect();
    assert_eq!(unbounded, bounded);
}

#[test]
fn so_is_each_variant_of_device_state() {
    let bounded: Vec<(String, bool)> =
        devices_done_wrong().into_iter().map(|variant| (variant.name.to_owned(), variant.expected.is_none())).collect();
    let unbounded: Vec<_> = proved(DEVICE_STATE).into_iter().filter(|(name, _)| !name.starts_with('[')).collect();
    assert_eq!(unbounded, bounded);
}

#[test]
fn names_in_brackets_are_no_rows_of_the_model() {
    let names: BTreeSet<&str> = removals().iter().map(|variant| variant.name).collect();
    let others: Vec<_> = proved(ROUND_LAW).into_iter().filter(|(name, _)| name.starts_with('[')).collect();
    assert!(others.len() >= 10 && others.iter().all(|(name, harmless)| !names.contains(name.as_str()) && !harmless));
}
