//! Every row with the name of its table and its key as text: for a reader that knows neither, such as a dump.

use serde::Serialize;

use super::State;

/// Is shown rows of all types.
pub trait RowVisitor {
    fn row<V: Serialize>(&mut self, table: &'static str, key: String, row: &V);
}

impl State {
    /// Shows every row, in the order of tables and keys.
    pub fn visit_rows(&self, visitor: &mut impl RowVisitor) {
        // Taken apart without a rest, so that a new table cannot be forgotten here.
        let Self {
            cluster,
            controllers,
            join_tokens,
            nodes,
            templates,
            tenants,
            users,
            networks,
            images,
            vms,
            tags,
            settings,
            prices,
            meters,
            lines,
            requests,
            quorum,
            index: _,
            woken: _,
            hash: _,
        } = self;
        macro_rules! show {
            ($($table:ident: $key:expr;)*) => {
                $(for (key, row) in $table.iter() {
                    visitor.row(stringify!($table), $key(key), row);
                })*
            };
        }
        fn text(key: &impl ToString) -> String {
            key.to_string()
        }
        show! {
            cluster: text;
            controllers: text;
            join_tokens: text;
            nodes: text;
            templates: text;
            tenants: text;
            users: text;
            networks: text;
            images: text;
            vms: text;
            tags: |(tenant, key): &(crate::TenantId, String)| format!("{tenant}/{key}");
            settings: text;
            prices: |from: &crate::Timestamp| from.0.to_string();
            meters: text;
            lines: |(tenant, number): &(crate::TenantId, u64)| format!("{tenant}/{number}");
            requests: text;
            quorum: text;
        }
    }
}
