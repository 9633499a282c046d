//! The report as one HTML page: no script, no address from which anything is loaded, readable on a phone and by a screen reader.

use std::fmt::Write as _;

use super::charts::{Figure, Numbers};
use super::study_report::StudyReport;
use super::svg::escaped;
use super::table::{Column, Row, ScoreTable};
use super::text::{NO_VALUE, facts, full_reason, has_paper, hours, interval_text, legend, number_text, ours_text, row_name, shown_notes};
use super::verdict::{Cell, Order, OrderVerdict, Verdict};
use crate::words::counted;

/// The style sheet.
const STYLE: &str = include_str!("page.css");
/// Trials that are listed; the JSON has all of them.
const MAX_TRIALS: usize = 500;
/// Rows of a table of numbers; the JSON has all of them.
const MAX_NUMBER_ROWS: usize = 400;

/// The page.
pub fn html(report: &StudyReport) -> String {
    let name = escaped(&report.name);
    let facts: String = facts(report).iter().map(|fact| format!("<li>{}</li>\n", escaped(fact))).collect();
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, \
         initial-scale=1\">\n<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>{name}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{name}</h1>\n<ul class=\"facts\">\n{facts}</ul>\n"
    );
    let heading = if report.source.is_some() { "The paper's table with ours beside it" } else { "Scores" };
    let _ = write!(
        page,
        "<section>\n<h2>{heading}</h2>\n{}<p class=\"quiet\">{}</p>\n",
        score_table(&report.table, heading),
        escaped(&legend(report))
    );
    if let Some(remark) = &report.remark {
        let _ = writeln!(page, "<p>{}</p>", escaped(remark));
    }
    page.push_str("</section>\n");
    page.push_str(&orders(&report.orders));
    page.push_str(&figures(&report.figures));
    if let Some(all) = &report.all_scores {
        let _ = write!(page, "<section>\n<h2>All scores</h2>\n{}</section>\n", score_table(all, "All arms and all scores"));
    }
    page.push_str(&trials(&report.table));
    let notes: String = shown_notes(report).map(|note| format!("<li>{}</li>\n", escaped(&note))).collect();
    if !notes.is_empty() {
        let _ = write!(page, "<section>\n<h2>Notes</h2>\n<ul>\n{notes}</ul>\n</section>\n");
    }
    page + "</main>\n</body>\n</html>\n"
}

fn score_table(table: &ScoreTable, caption: &str) -> String {
    let with_paper = has_paper(table);
    let mut head = String::from("<tr><td></td>");
    let mut second = String::from("<tr><td></td>");
    for column in &table.columns {
        let tolerance = column.tolerance.map_or_else(String::new, |tolerance| format!(" <span class=\"quiet\">± {tolerance}</span>"));
        let span = if with_paper { " colspan=\"5\" class=\"group\"" } else { "" };
        let scope = if with_paper { "colgroup" } else { "col" };
        let _ = write!(head, "<th scope=\"{scope}\"{span}>{}{tolerance}</th>", escaped(&column.name));
        second.push_str(
            "<th scope=\"col\" class=\"group\">paper</th><th scope=\"col\">ours</th><th scope=\"col\">95&nbsp;% interval</th><th \
             scope=\"col\">delta</th><th scope=\"col\">verdict</th>",
        );
    }
    let second = if with_paper { format!("{second}</tr>\n") } else { String::new() };
    let rows: String = table.rows.iter().map(|row| score_row(row, &table.columns, with_paper)).collect();
    format!(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{caption}\">\n<table>\n<thead>{head}</tr>\n{second}</thead>\n\
         <tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    )
}

fn score_row(row: &Row, columns: &[Column], with_paper: bool) -> String {
    let class = if with_paper && !row.in_paper { " class=\"extra\"" } else { "" };
    let mut text = format!("<tr{class}><th scope=\"row\">{}</th>", escaped(&row_name(row)));
    for (cell, column) in row.cells.iter().zip(columns) {
        let ours = ours_text(cell, column);
        if !with_paper {
            let _ = write!(text, "<td>{ours}</td>");
            continue;
        }
        let [paper, delta] = [number_text(cell.paper, column, false), number_text(cell.delta, column, true)];
        let _ =
            write!(text, "<td class=\"group\">{paper}</td><td><b>{ours}</b></td><td>{}</td><td>{delta}</td>", interval_text(cell, column));
        text.push_str(&verdict(cell));
    }
    text + "</tr>\n"
}

fn verdict(cell: &Cell) -> String {
    let (sign, class) = match cell.verdict {
        Verdict::Within => ("✓ ", "good"),
        Verdict::Above => ("▲ ", "warn"),
        Verdict::Below => ("▼ ", "bad"),
        Verdict::NoVerdict => ("", "quiet"),
    };
    let name = if cell.paper.is_none() { NO_VALUE } else { cell.verdict.name() };
    let reason = if cell.paper.is_some() { full_reason(cell) } else { String::new() };
    format!("<td class=\"{class} why\">{sign}{name}<small>{}</small></td>", escaped(&reason))
}

fn orders(orders: &[Order]) -> String {
    if orders.is_empty() {
        return String::new();
    }
    let item = |order: &Order| {
        let (sign, class) = match order.verdict {
            OrderVerdict::Holds => ("✓", "good"),
            OrderVerdict::Broken => ("✗", "bad"),
            OrderVerdict::Undecided => ("?", "warn"),
        };
        let steps: String =
            order.steps.iter().map(|step| format!("<li>{}: {}</li>\n", step.verdict.name(), escaped(&step.reason))).collect();
        let column = escaped(&order.column);
        format!("<li><b>{column}</b>: <span class=\"{class}\">{sign} {}</span>\n<ul>\n{steps}</ul></li>\n", order.verdict.name())
    };
    format!("<section>\n<h2>Orders that must come out</h2>\n<ul>\n{}</ul>\n</section>\n", orders.iter().map(item).collect::<String>())
}

fn figures(figures: &[Figure]) -> String {
    let mut text = String::new();
    let mut section = "";
    for figure in figures {
        if figure.section != section {
            text.push_str(if section.is_empty() { "" } else { "</div>\n</section>\n" });
            section = &figure.section;
            let _ = write!(text, "<section>\n<h2>{}</h2>\n<div class=\"plots\">\n", escaped(section));
        }
        let _ = write!(
            text,
            "<figure>\n<figcaption>{}</figcaption>\n<div class=\"scroll\">{}</div>\n<p class=\"quiet\">{}</p>\n<details>\n<summary>Numbers\
             </summary>\n{}</details>\n</figure>\n",
            escaped(&figure.title),
            figure.svg,
            escaped(&figure.caption),
            numbers(&figure.numbers)
        );
    }
    if section.is_empty() { text } else { text + "</div>\n</section>\n" }
}

fn numbers(numbers: &Numbers) -> String {
    let head: String = numbers.header.iter().map(|name| format!("<th scope=\"col\">{}</th>", escaped(name))).collect();
    let row =
        |row: &Vec<String>| format!("<tr>{}</tr>\n", row.iter().map(|cell| format!("<td>{}</td>", escaped(cell))).collect::<String>());
    let rows: String = numbers.rows.iter().take(MAX_NUMBER_ROWS).map(row).collect();
    let hidden = numbers.rows.len().saturating_sub(MAX_NUMBER_ROWS);
    let more = if hidden > 0 { format!("<p class=\"quiet\">and {hidden} more rows, which report.json has</p>\n") } else { String::new() };
    format!("<div class=\"scroll\"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n{more}")
}

fn trials(table: &ScoreTable) -> String {
    let all = table.rows.iter().flat_map(|row| row.trials.iter().map(move |trial| (row, trial)));
    let header = ["arm", "seed", "trial", "hash", "state", "step", "worker-hours", "run folder"].into_iter().map(str::to_owned).collect();
    let row = |(row, trial): (&Row, &super::table::TrialEntry)| {
        let failure = trial.failure.as_ref().map_or_else(String::new, |failure| format!(": {failure}"));
        vec![
            row.name.clone(),
            trial.seed.map_or_else(|| NO_VALUE.to_owned(), |seed| seed.to_string()),
            trial.name.clone(),
            trial.hash.chars().take(8).collect(),
            format!("{}{failure}", trial.state.replace('_', " ")),
            trial.step.to_string(),
            hours(trial.worker_hours),
            trial.folder.display().to_string(),
        ]
    };
    let count = all.clone().count();
    let rows: Vec<Vec<String>> = all.take(MAX_TRIALS).map(row).collect();
    let more = if count > rows.len() { format!(", the first {MAX_TRIALS} of them") } else { String::new() };
    let shown = counted(count, "trial") + &more;
    format!(
        "<section>\n<h2>Trials</h2>\n<details>\n<summary>{shown}</summary>\n{}</details>\n</section>\n",
        numbers(&Numbers { header, rows })
    )
}
