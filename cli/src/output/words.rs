//! Numbers as people read them.

use std::time::Duration;

/// `512 MiB`, `1.5 GiB`; one digit after the point, where there is something to tell.
pub fn size(bytes: u64) -> String {
    /// From here on one digit after the point would be rounded to 1024.0, which is one of the next unit.
    const NEXT: f64 = 1023.95;
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (bytes as f64 / 1024.0, "KiB");
    for larger in ["MiB", "GiB", "TiB", "PiB", "EiB"] {
        if value >= NEXT {
            (value, unit) = (value / 1024.0, larger);
        }
    }
    let digits = format!("{value:.1}");
    format!("{} {unit}", digits.strip_suffix(".0").unwrap_or(&digits))
}

/// `8 seconds`, `3 minutes`, `2 hours`, `5 days`: the largest unit of which there is one, rounded down.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    count_of(count, unit)
}

/// Seconds since 1970-01-01 UTC as `2026-11-29 20:33:09Z`.
pub fn instant(at: f64) -> String {
    // A time that is none, of a daemon that is not ours, is the beginning.
    let seconds = if at.is_finite() && at > 0.0 { at as u64 } else { 0 };
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    // Years that begin in March have their odd day at their end; 400 of them have always as many days.
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = if month < 10 { (year, month + 3) } else { (year + 1, month - 9) };
    let year = year + 400 * era;
    format!("{year:04}-{month:02}-{day:02} {hours:02}:{minutes:02}:{:02}Z", seconds % 60)
}

/// `1 guest`, `2 guests`.
pub fn count_of(count: u64, unit: &str) -> String {
    match count {
        1 => format!("1 {unit}"),
        _ => format!("{count} {unit}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_a_unit_and_at_most_one_digit_after_the_point() {
        let sizes = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (512 << 20, "512 MiB"),
            (3 << 29, "1.5 GiB"),
            ((1 << 30) - 1, "1 GiB"),
            (10_000_000_000, "9.3 GiB"),
            (1 << 40, "1 TiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (bytes, words) in sizes {
            assert_eq!(size(bytes), words, "{bytes}");
        }
    }

    #[test]
    fn instants_are_dates_and_times_of_day() {
        let instants = [
            (0.0, "1970-01-01 00:00:00Z"),
            (951_782_399.9, "2000-02-28 23:59:59Z"),
            (951_782_400.0, "2000-02-29 00:00:00Z"),
            (951_868_800.0, "2000-03-01 00:00:00Z"),
            (1_795_984_389.0, "2026-11-29 20:33:09Z"),
            (4_102_444_800.0, "2100-01-01 00:00:00Z"),
            (-5.0, "1970-01-01 00:00:00Z"),
            (f64::NAN, "1970-01-01 00:00:00Z"),
        ];
        for (at, words) in instants {
            assert_eq!(instant(at), words, "{at}");
        }
    }

    #[test]
    fn durations_are_told_in_the_largest_unit_of_which_there_is_one() {
        let durations = [
            (0, "0 seconds"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "1 minute"),
            (3599, "59 minutes"),
            (7200, "2 hours"),
            (86_400, "1 day"),
            (90 * 86_400, "90 days"),
        ];
        for (seconds, words) in durations {
            assert_eq!(duration(Duration::from_secs(seconds)), words, "{seconds}");
        }
    }
}
