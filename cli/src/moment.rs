//! Points in time as people write and read them: `2026-11-22`, `2026-11-22T14:05:00Z`. Always UTC, so that two
//! operators read the same; the calendar is Gregorian (algorithm: Howard Hinnant, "chrono-compatible low-level date
//! algorithms").

use std::time::{SystemTime, UNIX_EPOCH};

const DAY_MILLIS: u64 = 86_400_000;
/// The first day of the year 10000, from which on a year has five digits.
const END_DAYS: u64 = 2_932_897;

/// Milliseconds since the Unix epoch, of a date (its first moment), of a date with a time, or of a bare number of
/// milliseconds.
///
/// # Errors
/// With a sentence that says what is allowed.
pub fn moment(text: &str) -> Result<u64, String> {
    parse(text).ok_or_else(|| format!("'{text}' is not a time: write 2026-11-22 or 2026-11-22T14:05:00Z (UTC)"))
}

/// `2026-11-22 14:05:00`; `-` for 0, which stands for never.
pub fn moment_text(millis: u64) -> String {
    let days = millis / DAY_MILLIS;
    if millis == 0 || days >= END_DAYS {
        return "-".into();
    }
    let (year, month, day) = civil(days);
    let seconds = millis % DAY_MILLIS / 1000;
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

pub fn now_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn parse(text: &str) -> Option<u64> {
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return text.parse().ok();
    }
    let (date, time) = match text.split_once(['T', ' ']) {
        Some((date, time)) => (date, time.strip_suffix('Z').unwrap_or(time)),
        None => (text, "00:00:00"),
    };
    let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
    let [hour, minute, second] = numbers(time, ':', [2, 2, 2])?;
    if year < 1970 || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let days = days(year, month, day)?;
    Some(days * DAY_MILLIS + (hour * 3600 + minute * 60 + second) * 1000)
}

fn numbers<const N: usize>(text: &str, separator: char, widths: [usize; N]) -> Option<[u64; N]> {
    let mut parts = text.split(separator);
    let mut found = [0; N];
    for (slot, width) in found.iter_mut().zip(widths) {
        let part = parts.next()?;
        if part.len() != width || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        *slot = part.parse().ok()?;
    }
    parts.next().is_none().then_some(found)
}

/// Days since 1970-01-01; `None` for a day that the calendar does not have.
fn days(year: u64, month: u64, day: u64) -> Option<u64> {
    if !(1..=12).contains(&month) || day == 0 {
        return None;
    }
    let shifted_year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (shifted_year / 400, shifted_year % 400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = of_era * 365 + of_era / 4 - of_era / 100 + day_of_year;
    let days = (era * 146_097 + day_of_era).checked_sub(719_468)?;
    (civil(days) == (year, month, day)).then_some(days)
}

fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_read_and_write() {
        let known = [
            ("1970-01-02T00:00:00Z", 86_400_000, "1970-01-02 00:00:00"),
            ("2000-02-29 12:30:01", 951_827_401_000, "2000-02-29 12:30:01"),
            ("2026-11-22", 1_795_305_600_000, "2026-11-22 00:00:00"),
            ("1700000000123", 1_700_000_000_123, "2023-11-14 22:13:20"),
        ];
        for (text, millis, written) in known {
            assert_eq!(moment(text), Ok(millis), "{text}");
            assert_eq!(moment_text(millis), written);
        }
        for bad in [
            "2026-02-29",
            "2026-13-01",
            "2026-1-1",
            "1969-12-31",
            "2026-11-22T24:00:00",
            "yesterday",
            "2026-11-22T",
            "-",
        ] {
            assert!(moment(bad).is_err(), "{bad}");
        }
        assert_eq!([moment_text(0), moment_text(u64::MAX)], ["-", "-"]);
    }

    #[test]
    fn every_day_of_four_centuries_reads_back() {
        for day in 1..150_000 {
            assert_eq!(moment(&moment_text(day * DAY_MILLIS)), Ok(day * DAY_MILLIS), "{day}");
        }
    }
}
