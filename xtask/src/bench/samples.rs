//! Repeated measurements of one figure.

use serde_json::Value;

/// All measurements of a figure, in the order in which they were made.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds a measurement.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The middle one; of an even number, the mean of the two in the middle. NaN without any.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            len if len % 2 == 1 => sorted[len / 2],
            len => f64::midpoint(sorted[len / 2 - 1], sorted[len / 2]),
        }
    }

    /// The smallest.
    pub fn least(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// The largest.
    pub fn most(&self) -> f64 {
        self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    /// Median, and from least to most.
    pub fn show(&self, digits: usize) -> String {
        match self.0.len() {
            0 => "–".to_owned(),
            1 => format!("{:.digits$}", self.0[0]),
            _ => format!("{:.digits$} ({:.digits$}–{:.digits$})", self.median(), self.least(), self.most()),
        }
    }

    /// All of them.
    pub fn json(&self) -> Value {
        self.0.clone().into()
    }
}

/// Where the variant of this `name` stands in `variants`: what is compared is named, and never counted out.
///
/// # Panics
/// There is none of that name.
pub fn named(variants: &[&str], name: &str) -> usize {
    variants.iter().position(|known| *known == name).unwrap_or_else(|| panic!("no variant {name:?} in {variants:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        Samples(values.to_vec())
    }

    #[test]
    fn the_median_is_the_middle_of_the_sorted_values() {
        assert_eq!(samples(&[3.0, 1.0, 2.0]).median(), 2.0);
        assert_eq!(samples(&[4.0, 1.0, 2.0, 3.0]).median(), 2.5);
        assert!(samples(&[]).median().is_nan());
    }

    #[test]
    fn a_variant_is_found_by_its_name_alone() {
        assert_eq!(named(&["QEMU", "multifd"], "multifd"), 1);
        assert!(std::panic::catch_unwind(|| named(&["QEMU", "multifd"], "multi")).is_err());
    }

    #[test]
    fn shown_with_the_spread_where_there_is_one() {
        assert_eq!(samples(&[3.0, 1.0, 2.0]).show(1), "2.0 (1.0–3.0)");
        assert_eq!(samples(&[1.25]).show(2), "1.25");
        assert_eq!(samples(&[]).show(2), "–");
    }
}
