//! Training loss by step: one line for each arm, its seeds faint behind it.

use super::super::material::Material;
use super::super::svg::{Axis, HEIGHT, Label, Margins, Plot, label_space};
use super::super::table::{Row, ScoreTable};
use super::figure::{Figure, Numbers, drawn, id};

/// Seeds of an arm that are drawn.
const MAX_SEEDS: usize = 8;
/// Parts of a run after which its loss stands in the numbers.
const PARTS: [(&str, f64); 5] = [("first", 0.0), ("25 %", 0.25), ("50 %", 0.5), ("75 %", 0.75), ("last", 1.0)];

/// Loss by step.
type Line = Vec<(f64, f64)>;

/// The figure; `None` where no run has two steps.
pub fn figure(material: &Material, table: &ScoreTable) -> Option<Figure> {
    let (rows, left_out) = drawn(table, |row| !lines(material, row).is_empty());
    let all: Vec<(usize, &Row, Vec<Line>, Line)> = rows
        .into_iter()
        .map(|(series, row)| {
            let lines = lines(material, row);
            let mean = mean(&lines);
            (series, row, lines, mean)
        })
        .collect();
    if all.is_empty() {
        return None;
    }
    let points = || all.iter().flat_map(|(_, _, lines, _)| lines.iter().flatten().copied());
    let x = Axis::around("step", points().map(|(step, _)| step).chain([0.0]));
    let y = Axis::around("training loss", points().map(|(_, loss)| loss));
    let margins = Margins { right: label_space(all.iter().map(|(_, row, ..)| row.name.as_str())), ..Margins::default() };
    let mut plot = Plot::new(x, y, margins, HEIGHT);
    for (series, _, lines, _) in &all {
        lines.iter().filter(|_| lines.len() > 1).for_each(|line| plot.line(line, *series, "seed"));
    }
    let mut labels = Vec::new();
    for (series, row, _, mean) in &all {
        plot.line(mean, *series, "mean");
        if let Some(&(_, value)) = mean.last() {
            labels.push(Label { text: row.name.clone(), value, series: *series });
        }
    }
    plot.labels(&labels);
    let rows = all.iter().map(|(_, row, lines, mean)| numbers(row, lines.len(), mean)).collect();
    let header = ["arm", "seeds"].into_iter().map(str::to_owned).chain(PARTS.map(|(name, _)| name.to_owned())).collect();
    let title = "Training loss by step".to_owned();
    let description = format!("Lines of the training loss over the steps, for {}", names(&all));
    Some(Figure {
        section: "Training".to_owned(),
        svg: plot.finish(&id("curves", 1), &title, &description),
        title,
        description,
        caption: format!("A line is the mean over an arm's seeds; the faint ones are the seeds.{left_out}"),
        numbers: Numbers { header, rows },
    })
}

fn names(all: &[(usize, &Row, Vec<Line>, Line)]) -> String {
    all.iter().map(|(_, row, ..)| row.name.as_str()).collect::<Vec<_>>().join("; ")
}

fn lines(material: &Material, row: &Row) -> Vec<Line> {
    let line = |index: usize| -> Line {
        let points = &material.trials[index].run.view().curve.points;
        points.iter().filter_map(|point| Some((point.step as f64, point.loss?))).collect()
    };
    row.trials.iter().map(|trial| line(trial.index)).filter(|line| line.len() > 1).take(MAX_SEEDS).collect()
}

/// The mean of lines at the steps of the first, as far as all of them go.
fn mean(lines: &[Line]) -> Line {
    let Some(first) = lines.first() else { return Line::new() };
    let at = |step: f64| -> Option<f64> {
        let losses: Option<Vec<f64>> = lines.iter().map(|line| between(line, step)).collect();
        losses.map(|losses| losses.iter().sum::<f64>() / losses.len() as f64)
    };
    first.iter().filter_map(|&(step, _)| Some((step, at(step)?))).collect()
}

/// The loss of a line at a step, between its neighbours; `None` outside.
fn between(line: &Line, step: f64) -> Option<f64> {
    let after = line.iter().position(|&(known, _)| known >= step)?;
    let (next_step, next) = line[after];
    if next_step.total_cmp(&step).is_eq() {
        return Some(next);
    }
    let (last_step, last) = *line.get(after.checked_sub(1)?)?;
    Some(last + (next - last) * (step - last_step) / (next_step - last_step))
}

fn numbers(row: &Row, seeds: usize, mean: &Line) -> Vec<String> {
    let last = mean.len().saturating_sub(1) as f64;
    let at = |part: f64| {
        mean.get((last * part).round() as usize).map_or_else(|| "-".to_owned(), |(step, loss)| format!("{loss:.4} (step {step})"))
    };
    [row.name.clone(), seeds.to_string()].into_iter().chain(PARTS.map(|(_, part)| at(part))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_goes_as_far_as_all_lines() {
        let lines = [vec![(1.0, 4.0), (2.0, 3.0), (3.0, 2.0)], vec![(1.0, 2.0), (3.0, 0.0)], vec![(0.0, 3.0), (2.0, 3.0)]];
        assert_eq!(mean(&lines), [(1.0, 3.0), (2.0, 7.0 / 3.0)]);
        assert_eq!(mean(&lines[..1]), lines[0]);
        assert!(mean(&[]).is_empty());
    }
}
