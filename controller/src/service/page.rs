//! Pages: how many rows, and where the next page begins.

use api::error::ApiError;

const DEFAULT: u32 = 100;
const MOST: u32 = 1000;

pub(super) fn limit(asked: u32) -> Result<usize, ApiError> {
    match asked {
        0 => Ok(DEFAULT as usize),
        1..=MOST => Ok(asked as usize),
        _ => Err(ApiError::invalid(format!("limit is '{asked}', but must be 1 to {MOST}"))),
    }
}

/// The page out of rows that come after the cursor, and the cursor of the next one: the key of the last row when
/// there are more.
pub(super) fn cut<T>(rows: impl Iterator<Item = T>, limit: usize, key: impl Fn(&T) -> String) -> (Vec<T>, String) {
    let mut page: Vec<T> = rows.take(limit + 1).collect();
    let more = page.len() > limit;
    page.truncate(limit);
    let next = if more { page.last().map(key).unwrap_or_default() } else { String::new() };
    (page, next)
}

/// The cursor as the id of the last row that was shown; an empty one is before all.
pub(super) fn after<T: std::str::FromStr<Err = ()> + Default>(cursor: &str) -> Result<T, ApiError> {
    if cursor.is_empty() {
        return Ok(T::default());
    }
    cursor.parse().map_err(|()| ApiError::invalid("after is not a cursor that a list gave"))
}
