//! Draws groups of bars as SVG: the only kind of plot that the page needs.

use super::samples::Samples;

/// Bars that stand side by side in each group.
pub struct Series<'a> {
    /// What the legend says.
    pub name: &'a str,
    /// One bar for each group: its height is the median, a line shows least and most.
    pub bars: Vec<Samples>,
}

/// A chart of `groups`, with the unit of all bars.
pub fn bars(title: &str, unit: &str, groups: &[String], series: &[Series<'_>]) -> String {
    let highest = series.iter().flat_map(|series| &series.bars).map(Samples::most).filter(|most| most.is_finite());
    let top = ceiling(highest.fold(0.0, f64::max));
    let y = |value: f64| TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - value / top);
    let group_width = (WIDTH - LEFT - RIGHT) / groups.len().max(1) as f64;
    let bar_width = group_width * 0.85 / series.len().max(1) as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"15\">{} ({})</text>\n",
        escaped(title),
        escaped(unit)
    );
    for step in 0..=4 {
        let value = top * f64::from(step) / 4.0;
        let at = y(value);
        svg += &format!(
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            tick(value)
        );
    }
    for (index, group) in groups.iter().enumerate() {
        let left = LEFT + group_width * index as f64;
        let middle = left + group_width / 2.0;
        svg += &format!(
            "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n",
            HEIGHT - BOTTOM + 18.0,
            escaped(group)
        );
        for (position, one) in series.iter().enumerate() {
            let Some(samples) = one.bars.get(index).filter(|samples| samples.median().is_finite()) else { continue };
            let x = left + group_width * 0.075 + bar_width * position as f64;
            let (median, center) = (y(samples.median()), x + bar_width / 2.0);
            svg += &format!(
                "<rect x=\"{x:.1}\" y=\"{median:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"/>\n\
                 <line x1=\"{center:.1}\" y1=\"{:.1}\" x2=\"{center:.1}\" y2=\"{:.1}\" stroke=\"#222\"/>\n",
                bar_width * 0.92,
                y(0.0) - median,
                COLORS[position % COLORS.len()],
                y(samples.least()),
                y(samples.most())
            );
        }
    }
    let mut x = LEFT;
    for (position, one) in series.iter().enumerate() {
        svg += &format!(
            "<rect x=\"{x:.0}\" y=\"{:.0}\" width=\"11\" height=\"11\" fill=\"{}\"/>\n\
             <text x=\"{:.0}\" y=\"{:.0}\">{}</text>\n",
            HEIGHT - 22.0,
            COLORS[position % COLORS.len()],
            x + 15.0,
            HEIGHT - 12.0,
            escaped(one.name)
        );
        x += 32.0 + 6.6 * one.name.chars().count() as f64;
    }
    svg + "</svg>\n"
}

/// The next round number above `value`.
fn ceiling(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let magnitude = 10f64.powf(value.log10().floor());
    let steps = [1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 6.0, 8.0, 10.0];
    steps.iter().map(|step| step * magnitude).find(|top| *top >= value).unwrap_or(10.0 * magnitude)
}

fn tick(value: f64) -> String {
    if value >= 10.0 || value == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 56.0;
/// Told apart also by people who see colours differently.
const COLORS: &[&str] = &["#0072b2", "#d55e00", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#999999"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_ends_above_the_highest_bar() {
        for value in [0.0, 0.013, 0.9, 1.0, 1.01, 7.3, 9.9, 123.0, 999.0] {
            let top = ceiling(value);
            assert!(top >= value && top <= (value * 2.0).max(1.0), "{value}: {top}");
        }
    }

    #[test]
    fn text_cannot_break_out_of_the_picture() {
        let svg = bars("a < b & c", "µs", &["<g>".to_owned()], &[]);
        assert!(svg.contains("a &lt; b &amp; c") && svg.contains("&lt;g&gt;"));
    }
}
