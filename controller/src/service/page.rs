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

/// Rows that are looked at for one page: while they are, nothing is applied and nobody else is let in.
const MOST_VISITED: usize = 4096;

/// The page out of those rows after the cursor that `fit`, and the cursor of the next one: the key of the last row that was
/// looked at when there may be more. So a page can be short of its limit, or empty, and not be the last.
pub(super) fn cut<T: Copy>(
    rows: impl Iterator<Item = T>,
    fits: impl Fn(T) -> bool,
    limit: usize,
    key: impl Fn(T) -> String,
) -> (Vec<T>, String) {
    let (mut page, mut last) = (Vec::new(), None);
    for (visited, row) in rows.enumerate() {
        let fits = fits(row);
        if visited == MOST_VISITED || (fits && page.len() == limit) {
            return (page, last.map(key).unwrap_or_default());
        }
        if fits {
            page.push(row);
        }
        last = Some(row);
    }
    (page, String::new())
}

/// The cursor as the id of the last row that was shown; an empty one is before all.
pub(super) fn after<T: std::str::FromStr<Err = ()> + Default>(cursor: &str) -> Result<T, ApiError> {
    if cursor.is_empty() {
        return Ok(T::default());
    }
    cursor.parse().map_err(|()| ApiError::invalid("after is not a cursor that a list gave"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pages of rows from 1 to `rows`, each taken up where the one before it ended.
    fn pages(rows: usize, limit: usize, fits: impl Fn(usize) -> bool) -> Vec<Vec<usize>> {
        let (mut all, mut after) = (Vec::new(), String::new());
        loop {
            let first = after.parse().unwrap_or(0) + 1;
            let (page, next) = cut(first..=rows, &fits, limit, |row| row.to_string());
            all.push(page);
            if next.is_empty() {
                return all;
            }
            after = next;
        }
    }

    #[test]
    fn the_last_page_has_no_cursor() {
        assert_eq!(pages(5, 2, |_| true), [vec![1, 2], vec![3, 4], vec![5]]);
        assert_eq!(pages(4, 2, |_| true), [vec![1, 2], vec![3, 4]]);
        assert_eq!(pages(9, 2, |row| row % 3 == 0), [vec![3, 6], vec![9]]);
        assert_eq!(pages(0, 2, |_| true), [Vec::<usize>::new()]);
    }

    #[test]
    fn a_page_looks_at_so_many_rows_and_the_next_one_goes_on() {
        let only = |row| row == 2 * MOST_VISITED + 1;
        assert_eq!(pages(3 * MOST_VISITED, 2, only), [vec![], vec![], vec![2 * MOST_VISITED + 1]]);
        assert_eq!(pages(MOST_VISITED, 2, |_| false), [Vec::<usize>::new()]);
    }
}
