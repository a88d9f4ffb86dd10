//! Tests of KalamDB on a real cluster
