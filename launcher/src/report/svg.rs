//! A small writer of plots as SVG: axes with round ticks, marks, and labels beside the lines that they name.
//!
//! Colours are classes that the page fills in, so that one plot serves light and dark; an SVG library writes them into every mark. A plot
//! is drawn small with large letters, because a phone shows it at three quarters of its size.

/// Width of a plot.
pub const WIDTH: f64 = 440.0;
/// Height of a plot with a usual number of marks.
pub const HEIGHT: f64 = 300.0;
/// Colours that the page has; more series than these are not drawn.
pub const NUM_COLOURS: usize = 8;
/// Smallest distance of two labels, which is the height of their letters.
const LABEL_DISTANCE: f64 = 15.0;
/// Largest share of a plot's width that labels beside it take.
const LABEL_SHARE: f64 = 0.42;
/// What a text that was cut ends with.
const ELLIPSIS: char = '…';
/// About this many ticks on an axis.
const NUM_TICKS: f64 = 5.0;
/// An axis is logarithmic where its largest value is this many times its smallest.
const LOG_RATIO: f64 = 100.0;

/// Space around a plot's area.
#[derive(Clone, Copy, Debug)]
pub struct Margins {
    /// Above.
    pub top: f64,
    /// To the right, for labels.
    pub right: f64,
    /// Below, for the horizontal axis.
    pub bottom: f64,
    /// To the left, for the vertical axis.
    pub left: f64,
}

impl Default for Margins {
    fn default() -> Self {
        Self { top: 14.0, right: 14.0, bottom: 46.0, left: 56.0 }
    }
}

/// An axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    name: String,
    low: f64,
    high: f64,
    is_log: bool,
}

impl Axis {
    /// An axis that holds these values with some space around them. It is logarithmic where they span decades.
    pub fn around(name: &str, values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) =
            values.into_iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        let name = name.to_owned();
        if !low.is_finite() || !high.is_finite() {
            return Self { name, low: 0.0, high: 1.0, is_log: false };
        }
        if low > 0.0 && high / low >= LOG_RATIO {
            return Self { name, low: low / 1.2, high: high * 1.2, is_log: true };
        }
        let space = if high > low { (high - low) * 0.06 } else { high.abs().max(1.0) * 0.1 };
        Self { name, low: low - space, high: high + space, is_log: false }
    }

    /// An axis between two values.
    pub fn between(name: &str, low: f64, high: f64) -> Self {
        Self { name: name.to_owned(), low, high, is_log: false }
    }

    /// Where a value lies, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        if self.is_log { (value / self.low).ln() / (self.high / self.low).ln() } else { (value - self.low) / (self.high - self.low) }
    }

    /// Round values with their texts.
    fn ticks(&self) -> Vec<(f64, String)> {
        if self.is_log {
            let decades = self.low.log10().ceil() as i32..=self.high.log10().floor() as i32;
            let every = (f64::from(decades.end() - decades.start() + 1) / NUM_TICKS).ceil().max(1.0) as usize;
            return decades.step_by(every).map(|decade| 10.0_f64.powi(decade)).map(|value| (value, number(value, 0))).collect();
        }
        let step = round_step((self.high - self.low) / NUM_TICKS);
        let decimals = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        (first..=last).map(|multiple| multiple as f64 * step).map(|value| (value, number(value, decimals))).collect()
    }
}

/// The next larger of 1, 2 and 5 times a power of ten.
fn round_step(step: f64) -> f64 {
    let power = 10.0_f64.powf(step.log10().floor());
    let round = [1.0, 2.0, 5.0].into_iter().find(|&factor| step <= factor * power);
    round.unwrap_or(10.0) * power
}

/// A number on an axis; large ones short.
fn number(value: f64, decimals: usize) -> String {
    match value.abs() {
        size if size >= 1e6 => format!("{}M", trimmed(value / 1e6)),
        size if size >= 1e4 => format!("{}k", trimmed(value / 1e3)),
        size if size > 0.0 && size < 1e-3 => format!("{value:.0e}"),
        size if decimals == 0 && size < 1.0 => format!("{value}"),
        _ => format!("{value:.decimals$}"),
    }
}

/// At most three decimals, and none that are 0.
fn trimmed(value: f64) -> String {
    format!("{value:.3}").trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Shapes of marks, so that colour is not all that tells series apart.
const NUM_SHAPES: usize = 4;

/// A label beside the end of a line.
#[derive(Clone, Debug)]
pub struct Label {
    /// Its text.
    pub text: String,
    /// The value that it stands beside.
    pub value: f64,
    /// Number of its series.
    pub series: usize,
}

/// A plot with two axes.
#[derive(Debug)]
pub struct Plot {
    margins: Margins,
    height: f64,
    x: Axis,
    y: Axis,
    body: String,
}

impl Plot {
    /// A plot with its axes drawn.
    pub fn new(x: Axis, y: Axis, margins: Margins, height: f64) -> Self {
        let mut plot = Self { margins, height, x, y, body: String::new() };
        plot.draw_x_axis();
        plot.draw_y_axis();
        plot
    }

    /// A plot of this many rows, counted from the bottom, which the vertical axis does not number.
    pub fn of_rows(x: Axis, count: f64, margins: Margins, height: f64) -> Self {
        let mut plot = Self { margins, height, x, y: Axis::between("", 0.0, count), body: String::new() };
        plot.draw_x_axis();
        plot
    }

    /// A line; parts that leave the axes are not drawn.
    pub fn line(&mut self, points: &[(f64, f64)], series: usize, class: &str) {
        let places: Vec<String> = points.iter().map(|&(x, y)| format!("{:.1},{:.1}", self.across(x), self.down(y))).collect();
        if places.len() > 1 {
            self.add(&format!("<polyline class=\"line {class} c{}\" points=\"{}\"/>", series % NUM_COLOURS, places.join(" ")));
        }
    }

    /// A mark, with what a mouse over it shows.
    pub fn mark(&mut self, point: (f64, f64), series: usize, class: &str, title: &str) {
        let (x, y) = (self.across(point.0), self.down(point.1));
        let shape = match series % NUM_SHAPES {
            0 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\""),
            1 => format!("<rect x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\"", x - 4.0, y - 4.0),
            2 => format!("<path d=\"M{x:.1} {:.1}l5.5 9.5h-11z\"", y - 6.0),
            _ => format!("<path d=\"M{x:.1} {:.1}l6 6l-6 6l-6 -6z\"", y - 6.0),
        };
        let end = shape.split([' ', '<']).nth(1).unwrap_or_default().to_owned();
        self.add(&format!("{shape} class=\"mark {class} c{}\"><title>{}</title></{end}>", series % NUM_COLOURS, escaped(title)));
    }

    /// A vertical bar from one value to another, with short ends.
    pub fn error_bar(&mut self, x: f64, ends: (f64, f64), series: usize) {
        let (x, low, high) = (self.across(x), self.down(ends.0), self.down(ends.1));
        let (left, right) = (x - 4.0, x + 4.0);
        let path = format!("M{left:.1} {low:.1}H{right:.1}M{x:.1} {low:.1}V{high:.1}M{left:.1} {high:.1}H{right:.1}");
        self.add(&format!("<path class=\"bar c{}\" d=\"{path}\"/>", series % NUM_COLOURS));
    }

    /// A straight line from one point to another.
    pub fn rule(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        let ends = [self.across(from.0), self.down(from.1), self.across(to.0), self.down(to.1)];
        let [x1, y1, x2, y2] = ends;
        self.add(&format!("<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"));
    }

    /// The name of a row, at the left edge of the area.
    pub fn name_row(&mut self, height: f64, series: usize, name: &str) {
        let (x, y) = (self.margins.left + 2.0, self.down(height) + 4.0);
        let text = escaped(&fitted(name, WIDTH - self.margins.left - self.margins.right));
        self.add(&format!("<text class=\"label c{}\" x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>", series % NUM_COLOURS));
    }

    /// A small mark among many.
    pub fn dot(&mut self, point: (f64, f64), series: usize, title: &str) {
        let (x, y) = (self.across(point.0), self.down(point.1));
        let class = format!("dot c{}", series % NUM_COLOURS);
        self.add(&format!("<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"><title>{}</title></circle>", escaped(title)));
    }

    /// Labels right of the area, moved apart where they would overlap.
    pub fn labels(&mut self, labels: &[Label]) {
        let mut sorted: Vec<&Label> = labels.iter().collect();
        sorted.sort_by(|one, other| other.value.total_cmp(&one.value));
        let wanted: Vec<f64> = sorted.iter().map(|label| self.down(label.value) + 4.0).collect();
        let places = spread(&wanted, self.margins.top + 8.0, self.height - self.margins.bottom);
        let x = WIDTH - self.margins.right + 6.0;
        for (label, y) in sorted.iter().zip(places) {
            let text = fitted(&label.text, self.margins.right - 8.0);
            let title = if text == label.text { String::new() } else { format!("<title>{}</title>", escaped(&label.text)) };
            self.add(&format!(
                "<text class=\"label c{}\" x=\"{x:.1}\" y=\"{y:.1}\">{title}{}</text>",
                label.series % NUM_COLOURS,
                escaped(&text)
            ));
        }
    }

    /// The finished picture, named by two elements with these ids.
    pub fn finish(self, id: &str, title: &str, description: &str) -> String {
        picture(id, (title, description), self.height, &self.body)
    }

    fn draw_x_axis(&mut self) {
        let (top, bottom) = (self.margins.top, self.height - self.margins.bottom);
        for (value, text) in self.x.ticks() {
            let x = self.across(value);
            self.add(&format!("<line class=\"grid\" x1=\"{x:.1}\" y1=\"{top:.1}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\"/>"));
            self.add(&format!("<text class=\"middle\" x=\"{x:.1}\" y=\"{:.1}\">{text}</text>", bottom + 17.0));
        }
        let middle = f64::midpoint(self.margins.left, WIDTH - self.margins.right);
        let name = escaped(&axis_name(&self.x));
        self.add(&format!("<text class=\"middle\" x=\"{middle:.1}\" y=\"{:.1}\">{name}</text>", self.height - 8.0));
    }

    fn draw_y_axis(&mut self) {
        let (left, right) = (self.margins.left, WIDTH - self.margins.right);
        for (value, text) in self.y.ticks() {
            let y = self.down(value);
            self.add(&format!("<line class=\"grid\" x1=\"{left:.1}\" y1=\"{y:.1}\" x2=\"{right:.1}\" y2=\"{y:.1}\"/>"));
            self.add(&format!("<text class=\"end\" x=\"{:.1}\" y=\"{:.1}\">{text}</text>", left - 6.0, y + 4.0));
        }
        let middle = f64::midpoint(self.margins.top, self.height - self.margins.bottom);
        let name = escaped(&axis_name(&self.y));
        self.add(&format!("<text class=\"middle\" transform=\"translate(13 {middle:.1}) rotate(-90)\">{name}</text>"));
    }

    fn across(&self, value: f64) -> f64 {
        let width = WIDTH - self.margins.left - self.margins.right;
        self.margins.left + self.x.place(value).clamp(0.0, 1.0) * width
    }

    fn down(&self, value: f64) -> f64 {
        let height = self.height - self.margins.top - self.margins.bottom;
        self.margins.top + (1.0 - self.y.place(value).clamp(0.0, 1.0)) * height
    }

    fn add(&mut self, element: &str) {
        self.body.push_str(element);
        self.body.push('\n');
    }
}

fn axis_name(axis: &Axis) -> String {
    if axis.is_log { format!("{} (logarithmic)", axis.name) } else { axis.name.clone() }
}

/// Elements as a picture that a screen reader can name.
pub fn picture(id: &str, names: (&str, &str), height: f64, body: &str) -> String {
    let (title, description) = (escaped(names.0), escaped(names.1));
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\">\n<title id=\"{id}-t\">{title}</title>\n\
         <desc id=\"{id}-d\">{description}</desc>\n{body}</svg>"
    )
}

/// Text that means itself in SVG and HTML. Control characters are no XML.
pub fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            control if control.is_control() => safe.push(' '),
            other => safe.push(other),
        }
    }
    safe
}

/// The space that labels take, at most a bit less than half a plot.
pub fn label_space<'a>(labels: impl IntoIterator<Item = &'a str>) -> f64 {
    let widest = labels.into_iter().map(text_width).fold(0.0, f64::max);
    (widest + 14.0).min(WIDTH * LABEL_SHARE)
}

/// A text cut to a width.
pub fn fitted(text: &str, width: f64) -> String {
    if text_width(text) <= width {
        return text.to_owned();
    }
    let mut left = width - letter_width(ELLIPSIS);
    let fits = |letter: &char| {
        left -= letter_width(*letter);
        left >= 0.0
    };
    let cut: String = text.chars().take_while(fits).collect();
    format!("{}{ELLIPSIS}", cut.trim_end())
}

fn text_width(text: &str) -> f64 {
    text.chars().map(letter_width).sum()
}

/// About the width of a bold letter of the page's size in the widest of its fonts.
fn letter_width(letter: char) -> f64 {
    match letter {
        ' ' | '.' | ',' | ':' | '\'' | '|' | 'i' | 'j' | 'l' => 4.9,
        '(' | ')' | '[' | ']' | '/' | '-' | '_' | 'f' | 'r' | 't' | 'I' => 6.5,
        'm' | 'w' | 'M' | 'W' | '%' | '@' | ELLIPSIS => 13.6,
        '=' | '+' | '<' | '>' | 'A'..='Z' => 10.9,
        _ => 9.2,
    }
}

/// Places from top to bottom, as near to the wanted ones as their distance allows.
fn spread(wanted: &[f64], top: f64, bottom: f64) -> Vec<f64> {
    let mut places = wanted.to_vec();
    let mut next = top;
    for place in &mut places {
        *place = place.max(next);
        next = *place + LABEL_DISTANCE;
    }
    let mut last = bottom;
    for place in places.iter_mut().rev() {
        *place = place.min(last);
        last = *place - LABEL_DISTANCE;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(axis: &Axis) -> Vec<String> {
        axis.ticks().into_iter().map(|(_, text)| text).collect()
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(&Axis::between("x", 0.0, 1.0)), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(ticks(&Axis::between("x", 23.7, 31.2)), ["24", "26", "28", "30"]);
        assert_eq!(ticks(&Axis::between("x", 0.0, 40_000.0)), ["0", "10k", "20k", "30k", "40k"]);
        assert_eq!(ticks(&Axis::between("x", 0.0, 2_500_000.0)), ["0", "500k", "1M", "1.5M", "2M", "2.5M"]);
        assert_eq!(ticks(&Axis::around("x", [0.001, 1.0])), ["0.001", "0.01", "0.1", "1"]);
        assert_eq!(ticks(&Axis::around("x", [1e-5, 2e-3])), ["1e-5", "1e-4", "0.001"]);
        // Equal values and none at all still make an axis.
        assert!(ticks(&Axis::around("x", [5.0, 5.0])).len() > 2);
        assert!(ticks(&Axis::around("x", [])).len() > 2);
        assert!(
            !Axis::around("x", [0.0, 1000.0]).is_log && !Axis::around("x", [1.0, 99.0]).is_log && Axis::around("x", [1.0, 100.0]).is_log
        );
    }

    #[test]
    fn labels_keep_their_distance_and_their_order() {
        let places = spread(&[100.0, 101.0, 102.0, 290.0], 20.0, 290.0);
        assert_eq!(places, [100.0, 115.0, 130.0, 290.0]);
        let places = spread(&[288.0, 289.0, 290.0], 20.0, 290.0);
        assert_eq!(places, [260.0, 275.0, 290.0]);
    }

    #[test]
    fn names_from_outside_are_text() {
        let mut plot = Plot::new(Axis::between("<x>", 0.0, 1.0), Axis::between("y", 0.0, 1.0), Margins::default(), HEIGHT);
        plot.mark((0.5, 0.5), 2, "", "</title><script>");
        plot.labels(&[Label { text: "a & b".to_owned(), value: 0.5, series: 1 }]);
        let picture = plot.finish("f1", "\"t\"", "d\0");
        assert!(picture.contains("&lt;x&gt;") && picture.contains("a &amp; b") && picture.contains("&quot;t&quot;"));
        assert!(!picture.contains("<script") && !picture.contains('\0'));
        assert!(picture.contains("</path>") && picture.starts_with("<svg viewBox=\"0 0 440 300\" role=\"img\""));
    }

    #[test]
    fn long_labels_are_cut() {
        assert_eq!(fitted("auxiliary=mlm", 200.0), "auxiliary=mlm");
        assert_eq!(fitted("auxiliary=mlm, ratio=0.2", 130.0), "auxiliary=mlm,…");
        assert_eq!(fitted("mmmmmm", 1.0), "…");
        // Wide letters take more space than as many narrow ones, and a label has the space that was kept for it.
        let label = "auxiliary=dummy_mlm";
        assert!(label_space([label]) > label_space(["auxiliary=collected"]));
        assert_eq!(fitted(label, label_space([label]) - 8.0), label);
        assert!(label_space(["a very very long label that no plot has space for"]) < WIDTH * 0.5);
    }
}
