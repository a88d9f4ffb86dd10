//! Clock, faults, builders and servers for tests

pub mod fault_store;

pub mod pod;
