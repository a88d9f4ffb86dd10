//! Rebuilds the states of instances from what is stored, once, at open.
//!
//! Generations up to the flushed one are in files: what is left of them was being removed when the process ended, and
//! is removed now. Everything above is counted. May be interrupted anywhere: it only removes what is published.

use kalamdb_model::{Generation, InstanceId, key};

use crate::error::ReadError;
use crate::keys;
use crate::row::Header;
use crate::state::{Filling, State};
use crate::store::{Store, reading, split};

impl Store {
    /// One pass over the stored rows.
    pub(crate) fn recover(&self) -> Result<(), ReadError> {
        let mut from = Vec::new();
        while let Some(key) = self.first_key(from)? {
            let (instance, _) = keys::parse_instance(&key).map_err(|source| ReadError::Key { source })?;
            self.recover_instance(&instance)?;
            match key::after(&keys::instance_prefix(&instance)) {
                Some(next) => from = next,
                None => break,
            }
        }
        Ok(())
    }

    fn first_key(&self, from: Vec<u8>) -> Result<Option<Vec<u8>>, ReadError> {
        let rows = self.rows(from, None);
        let key = rows.key().map(<[u8]>::to_vec);
        rows.status().map_err(reading)?;
        Ok(key)
    }

    fn recover_instance(&self, instance: &InstanceId) -> Result<(), ReadError> {
        let mut state = State::of_record(&self.record(instance)?.unwrap_or_default());
        let live = keys::generation_prefix(instance, Generation(state.flushed.0.saturating_add(1)));
        let removed = self.remove(keys::instance_prefix(instance), Some(live.clone()))?;
        if removed > 0 {
            tracing::info!(table = instance.table.0, rows = removed, "removed rows that were flushed before");
        }
        self.count(instance, live, &mut state)?;
        if !state.fillings.is_empty() {
            self.states.of(instance).insert(instance.clone(), state);
        }
        Ok(())
    }

    fn count(&self, instance: &InstanceId, from: Vec<u8>, state: &mut State) -> Result<(), ReadError> {
        let offset = keys::generation_offset(instance);
        let mut rows = self.rows(from, key::after(&keys::instance_prefix(instance)));
        while let Some((key, value)) = rows.item() {
            let (generation, _) = split(key, offset)?;
            let header = Header::parse(value).map_err(|source| ReadError::Row { source })?;
            state.last_seq = state.last_seq.max(header.seq);
            if state.fillings.last().is_none_or(|filling| filling.generation != generation) {
                state.fillings.push(Filling::new(generation));
            }
            if let Some(filling) = state.fillings.last_mut() {
                filling.add(key.len() + value.len(), None, header.updated_us);
            }
            state.active = state.active.max(generation);
            rows.next();
        }
        state.used_seq = state.last_seq;
        rows.status().map_err(reading)
    }
}
