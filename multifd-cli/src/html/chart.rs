//! Pictures of figures, as SVG within the page.

/// A bar for each of `values`, which are called `names`; `show` is the text of a value.
pub(super) fn bars(title: &str, names: &[String], values: &[f64], show: impl Fn(f64) -> String) -> String {
    let most = values.iter().copied().fold(0.0, f64::max);
    let step = WIDTH / values.len().max(1) as f64;
    let width = (step * 0.8).min(WIDEST);
    // Labels must not touch.
    let every = (LABEL / step).ceil().max(1.0) as usize;
    let mut out = format!(
        "<h3>{title}, at most {}</h3>\n<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\">",
        show(most),
        HEIGHT + 16.0
    );
    for (index, value) in values.iter().enumerate() {
        let height = if most > 0.0 { value / most * (HEIGHT - 4.0) } else { 0.0 };
        let (x, y) = (step * (index as f64 + 0.5) - width / 2.0, HEIGHT - height);
        let name = names.get(index).map_or("", String::as_str);
        out.push_str(&format!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"><title>{name}: {}</title></rect>",
            show(*value)
        ));
        if index % every == 0 {
            let middle = step * (index as f64 + 0.5);
            out.push_str(&format!(
                "<text x=\"{middle:.1}\" y=\"{}\" text-anchor=\"middle\">{name}</text>",
                HEIGHT + 12.0
            ));
        }
    }
    out.push_str(&format!("<line class=\"axis\" x1=\"0\" x2=\"{WIDTH}\" y1=\"{HEIGHT}\" y2=\"{HEIGHT}\"/></svg>\n"));
    out
}

/// One bar that is split into `parts`, with what each is.
pub(super) fn split(parts: &[(String, f64)], show: impl Fn(f64) -> String) -> String {
    let whole: f64 = parts.iter().map(|(_, value)| value).sum();
    let mut out = format!("<svg viewBox=\"0 0 {WIDTH} 24\" role=\"img\">");
    let mut x = 0.0;
    for ((name, value), colour) in parts.iter().zip(COLOURS.iter().cycle()) {
        let width = if whole > 0.0 { value / whole * WIDTH } else { 0.0 };
        let text = show(*value);
        out.push_str(&format!(
            "<rect x=\"{x:.1}\" y=\"0\" width=\"{width:.1}\" height=\"24\" style=\"fill:{colour}\"><title>{name}: {text}</title></rect>"
        ));
        x += width;
    }
    out.push_str("</svg>\n<ul class=\"key\">");
    for ((name, value), colour) in parts.iter().zip(COLOURS.iter().cycle()) {
        out.push_str(&format!("<li><i style=\"background:{colour}\"></i>{name} {}</li>", show(*value)));
    }
    out.push_str("</ul>\n");
    out
}

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 110.0;
const WIDEST: f64 = 40.0;
/// Of the longest name below a bar.
const LABEL: f64 = 34.0;
const COLOURS: [&str; 5] = ["#2f6feb", "#8250df", "#bf3989", "#bc4c00", "#1a7f37"];
