//! Keys of stored rows: `[shard u16][user length u16][user][table u32][generation u32][primary key]`, big endian.
//!
//! The length before the user's bytes is what keeps users apart: no user id can be a prefix of another's range, and a
//! shard, a user, an instance and a generation are each one contiguous range. A shared table has user length 0, which
//! no user id has.

use kalamdb_model::{Generation, InstanceId, Owner, ShardId, TableId, UserId};

const SHARD_BYTES: usize = 2;
const USER_LENGTH_BYTES: usize = 2;
const TABLE_BYTES: usize = 4;
pub(crate) const GENERATION_BYTES: usize = 4;
/// Everything but the user and the primary key.
const FIXED_BYTES: usize = SHARD_BYTES + USER_LENGTH_BYTES + TABLE_BYTES + GENERATION_BYTES;

/// Why bytes are no row key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Ends within its fixed part.
    #[error("a stored key of {0} bytes is too short")]
    Short(usize),
    /// The user is no valid user id.
    #[error("a stored key holds an impossible user id")]
    User,
    /// The shard is not the one of its user or table.
    #[error("a stored key says shard {found}, its owner belongs to {expected}")]
    Shard {
        /// In the key.
        found: u16,
        /// By the owner.
        expected: u16,
    },
}

/// The key of one row.
#[must_use]
pub fn row_key(instance: &InstanceId, generation: Generation, pk: &[u8]) -> Vec<u8> {
    let mut key = instance_key(instance, GENERATION_BYTES + pk.len());
    key.extend(generation.0.to_be_bytes());
    key.extend(pk);
    key
}

/// What the keys of all rows of `instance`, and of nothing else, start with.
#[must_use]
pub fn instance_prefix(instance: &InstanceId) -> Vec<u8> {
    instance_key(instance, 0)
}

/// What the keys of all rows of one generation, and of nothing else, start with.
#[must_use]
pub fn generation_prefix(instance: &InstanceId, generation: Generation) -> Vec<u8> {
    row_key(instance, generation, &[])
}

/// What the keys of all rows of a shard, and of nothing else, start with.
#[must_use]
pub const fn shard_prefix(shard: ShardId) -> [u8; SHARD_BYTES] {
    shard.0.to_be_bytes()
}

/// Where the generation lies in the keys of `instance`.
#[must_use]
pub fn generation_offset(instance: &InstanceId) -> usize {
    SHARD_BYTES + USER_LENGTH_BYTES + user_bytes(instance).len() + TABLE_BYTES
}

/// Writes `generation` into a key that [`row_key`] made, at its [`generation_offset`].
pub(crate) fn stamp(key: &mut [u8], offset: usize, generation: Generation) {
    key[offset..offset + GENERATION_BYTES].copy_from_slice(&generation.0.to_be_bytes());
}

/// Takes a row key apart.
///
/// # Errors
/// If no [`row_key`] made it.
pub fn parse(key: &[u8]) -> Result<(InstanceId, Generation, &[u8]), KeyError> {
    let (instance, rest) = parse_instance(key)?;
    let (generation, pk) = rest.split_first_chunk().ok_or(KeyError::Short(key.len()))?;
    Ok((instance, Generation(u32::from_be_bytes(*generation)), pk))
}

/// Takes an instance prefix off the front of `key`.
pub(crate) fn parse_instance(key: &[u8]) -> Result<(InstanceId, &[u8]), KeyError> {
    let short = KeyError::Short(key.len());
    let (shard, rest) = key.split_first_chunk().ok_or(short)?;
    let (length, rest) = rest.split_first_chunk().ok_or(short)?;
    let (user, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length))).ok_or(short)?;
    let (table, rest) = rest.split_first_chunk().ok_or(short)?;
    let owner = if user.is_empty() {
        Owner::Shared
    } else {
        let text = std::str::from_utf8(user).map_err(|_| KeyError::User)?;
        Owner::User(UserId::new(text).map_err(|_| KeyError::User)?)
    };
    let instance = InstanceId { owner, table: TableId(u32::from_be_bytes(*table)) };
    let (found, expected) = (u16::from_be_bytes(*shard), instance.shard().0);
    if found == expected { Ok((instance, rest)) } else { Err(KeyError::Shard { found, expected }) }
}

fn user_bytes(instance: &InstanceId) -> &[u8] {
    match &instance.owner {
        Owner::Shared => &[],
        Owner::User(user) => user.as_str().as_bytes(),
    }
}

fn instance_key(instance: &InstanceId, more: usize) -> Vec<u8> {
    let user = user_bytes(instance);
    let mut key = Vec::with_capacity(FIXED_BYTES + user.len() + more);
    key.extend(shard_prefix(instance.shard()));
    key.extend(u16::try_from(user.len()).expect("a user id has at most 256 bytes").to_be_bytes());
    key.extend(user);
    key.extend(instance.table.0.to_be_bytes());
    key
}

#[cfg(test)]
mod tests {
    use kalamdb_model::key::after;
    use proptest::prelude::*;

    use super::*;

    /// Ids that are prefixes of each other, differ in case, or need many bytes, beside arbitrary ones.
    fn instances() -> impl Strategy<Value = InstanceId> {
        let user = prop_oneof![
            Just("a".to_owned()),
            Just("a/".to_owned()),
            Just("A".to_owned()),
            Just("aa".to_owned()),
            Just("é".to_owned()),
            Just("e\u{301}".to_owned()),
            Just("x".repeat(256)),
            "[^\\p{Cc}]{1,64}".prop_filter("a user id", |id| UserId::new(id.clone()).is_ok()),
        ];
        let owner = prop_oneof![
            1 => Just(Owner::Shared),
            4 => user.prop_map(|id| Owner::User(UserId::new(id).expect("valid"))),
        ];
        let table = prop_oneof![0_u32..4, Just(u32::MAX), any::<u32>()];
        (owner, table).prop_map(|(owner, table)| InstanceId { owner, table: TableId(table) })
    }

    fn pks() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![any::<Vec<u8>>(), Just(vec![]), Just(vec![0xFF; 40])]
    }

    proptest! {
        #[test]
        fn a_key_reads_back(instance in instances(), generation in any::<u32>(), pk in pks()) {
            let key = row_key(&instance, Generation(generation), &pk);
            prop_assert_eq!(parse(&key), Ok((instance.clone(), Generation(generation), pk.as_slice())));
            let mut stamped = row_key(&instance, Generation(0), &pk);
            stamp(&mut stamped, generation_offset(&instance), Generation(generation));
            prop_assert_eq!(stamped, key);
        }

        #[test]
        fn no_instance_lies_in_the_range_of_another(
            a in instances(), b in instances(), generations in any::<(u32, u32)>(), pks in (pks(), pks()),
        ) {
            prop_assume!(a != b);
            let (low, high) = (instance_prefix(&a), after(&instance_prefix(&a)).expect("a prefix is not all 0xFF"));
            let own = row_key(&a, Generation(generations.0), &pks.0);
            let foreign = row_key(&b, Generation(generations.1), &pks.1);
            prop_assert!(low <= own && own < high);
            prop_assert!(foreign < low || high <= foreign);
        }

        #[test]
        fn a_shard_and_a_user_are_each_one_range(a in instances(), b in instances(), pk in pks()) {
            let key = row_key(&b, Generation(7), &pk);
            prop_assert_eq!(key.starts_with(&shard_prefix(a.shard())), a.shard() == b.shard());
            let instance = instance_prefix(&a);
            let user = &instance[..instance.len() - TABLE_BYTES];
            if matches!(a.owner, Owner::User(_)) {
                prop_assert_eq!(key.starts_with(user), a.owner == b.owner);
            }
        }

        #[test]
        fn within_an_instance_order_is_by_generation_and_then_by_primary_key(
            instance in instances(), a in (any::<u32>(), pks()), b in (any::<u32>(), pks()),
        ) {
            let key = |of: &(u32, Vec<u8>)| row_key(&instance, Generation(of.0), &of.1);
            prop_assert_eq!(key(&a).cmp(&key(&b)), a.cmp(&b));
        }

        #[test]
        fn any_bytes_are_a_key_or_an_error(bytes in any::<Vec<u8>>()) {
            if let Ok((instance, generation, pk)) = parse(&bytes) {
                prop_assert_eq!(row_key(&instance, generation, pk), bytes);
            }
        }
    }

    #[test]
    fn a_key_with_the_shard_of_another_owner_is_refused() {
        let mut key = row_key(&InstanceId { owner: Owner::Shared, table: TableId(1) }, Generation(1), b"k");
        key[1] ^= 1;
        assert!(matches!(parse(&key), Err(KeyError::Shard { .. })));
    }
}
