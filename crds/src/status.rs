//! What the statuses of all kinds share.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Who depends on an object: a count and a sample, because a status must not grow with the cluster.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Dependents {
    /// How many.
    #[schemars(range(min = 0))]
    pub count: i32,
    /// Names of the first ten, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10), inner(length(max = 253)))]
    pub sample: Vec<String>,
}

impl Dependents {
    /// Longest sample.
    pub const SAMPLE_MAX: usize = 10;

    /// Counts `names` and keeps the first ten in order.
    #[must_use]
    pub fn of(names: impl IntoIterator<Item = String>) -> Self {
        let mut names: Vec<String> = names.into_iter().collect();
        names.sort();
        let count = i32::try_from(names.len()).unwrap_or(i32::MAX);
        names.truncate(Self::SAMPLE_MAX);
        Self { count, sample: names }
    }
}

/// A status that the operator can fill without knowing the kind.
pub trait HasConditions {
    /// The conditions, by type.
    fn conditions(&self) -> &[Condition];
    /// The conditions, to change.
    fn conditions_mut(&mut self) -> &mut Vec<Condition>;
    /// Generation of the spec that the status speaks of, to change.
    fn observed_generation_mut(&mut self) -> &mut Option<i64>;
    /// Catalog version that contains that generation, to change.
    fn catalog_version_mut(&mut self) -> &mut Option<i64>;
}

macro_rules! has_conditions {
    ($($status:ty),*) => {$(
        impl $crate::HasConditions for $status {
            fn conditions(&self) -> &[Condition] {
                &self.conditions
            }
            fn conditions_mut(&mut self) -> &mut Vec<Condition> {
                &mut self.conditions
            }
            fn observed_generation_mut(&mut self) -> &mut Option<i64> {
                &mut self.observed_generation
            }
            fn catalog_version_mut(&mut self) -> &mut Option<i64> {
                &mut self.catalog_version
            }
        }
    )*};
}
pub(crate) use has_conditions;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependents_are_counted_in_full_and_sampled_in_order() {
        let dependents = Dependents::of((0..12).rev().map(|n| format!("app.t{n:02}")));
        assert_eq!(dependents.count, 12);
        assert_eq!(dependents.sample.len(), Dependents::SAMPLE_MAX);
        assert_eq!(dependents.sample.first().map(String::as_str), Some("app.t00"));
    }
}
