//! The time of day.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix time, in seconds; 0 on a host whose clock stands before 1970.
pub fn unix_now_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
