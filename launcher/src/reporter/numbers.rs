//! Numbers as a person reads them, and the time that is left.

/// Seconds per step from two moments of one generation; `None` before a second step was seen.
pub(super) fn pace(first: (u64, f64), now: (u64, f64)) -> Option<f64> {
    let steps = now.0.checked_sub(first.0).filter(|&steps| steps > 0)?;
    let seconds = now.1 - first.1;
    (seconds >= 0.0).then(|| seconds / steps as f64)
}

/// Seconds until the last step; `None` where the pace is not known.
pub(super) fn eta_seconds(step: u64, total_steps: u64, seconds_per_step: Option<f64>) -> Option<f64> {
    Some(total_steps.saturating_sub(step) as f64 * seconds_per_step?)
}

/// `0:42`, `12:05`, `1:02:03`; whole seconds, rounded.
pub(crate) fn clock_text(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

/// Two or three digits with a thousands letter: `8.1`, `812`, `1.2k`, `33k`, `4.5M`.
pub(crate) fn compact(number: f64) -> String {
    if !number.is_finite() {
        return "?".to_owned();
    }
    let (scaled, letter) = match number.abs() {
        // 999.5 is where rounding to whole numbers would show four digits.
        size if size < 999.5 => (number, ""),
        size if size < 999.5e3 => (number / 1e3, "k"),
        size if size < 999.5e6 => (number / 1e6, "M"),
        _ => (number / 1e9, "G"),
    };
    // 9.95 is where one decimal would show three digits.
    if scaled.abs() < 9.95 { format!("{scaled:.1}{letter}") } else { format!("{scaled:.0}{letter}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks() {
        let cases = [
            (0.0, "0:00"),
            (41.6, "0:42"),
            (59.6, "1:00"),
            (725.0, "12:05"),
            (3723.0, "1:02:03"),
            (-1.0, "0:00"),
            (360_000.0, "100:00:00"),
        ];
        for (seconds, text) in cases {
            assert_eq!(clock_text(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn compact_numbers() {
        let cases = [
            (0.0, "0.0"),
            (8.07, "8.1"),
            (9.96, "10"),
            (812.3, "812"),
            (999.4, "999"),
            (999.6, "1.0k"),
            (1234.0, "1.2k"),
            (33_000.0, "33k"),
            (999_600.0, "1.0M"),
            (4.5e6, "4.5M"),
            (2.0e9, "2.0G"),
            (f64::NAN, "?"),
        ];
        for (number, text) in cases {
            assert_eq!(compact(number), text, "{number}");
        }
    }

    #[test]
    fn time_left() {
        let cases = [
            ("ten steps in five seconds, 180 left", (110, 100.0), (120, 105.0), 300, Some("1:30")),
            ("the last step", (110, 100.0), (300, 105.0), 300, Some("0:00")),
            ("beyond the last step", (110, 100.0), (310, 105.0), 300, Some("0:00")),
            ("one step only", (120, 100.0), (120, 100.0), 300, None),
            ("a step that goes back", (120, 100.0), (110, 105.0), 300, None),
            ("a clock that goes back", (110, 100.0), (120, 95.0), 300, None),
        ];
        for (name, first, now, total, left) in cases {
            let found = eta_seconds(now.0, total, pace(first, now)).map(clock_text);
            assert_eq!(found.as_deref(), left, "{name}");
        }
    }
}
