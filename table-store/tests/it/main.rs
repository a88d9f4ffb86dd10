//! One suite of promises, kept by every store: memory, a folder, and a real S3 server.
//!
//! The S3 server is named by `KALAMDB_TEST_S3_ENDPOINT`, `…_ACCESS_KEY`, `…_SECRET_KEY` and `…_BUCKET`
//! (`e2e/cluster/s3.sh run` sets them). Without it the S3 part says that it did not run; with
//! `KALAMDB_TEST_REQUIRE_S3=1` it fails instead.
#![allow(clippy::unwrap_used, clippy::panic)]

mod backend;
mod catalog;
mod creation;
#[path = "../../../test-support/src/fault_store.rs"]
mod fault_store;
mod faults;
mod formats;
mod objects;
mod parquet;
mod sample;
mod streams;
mod truncation;
mod users;

macro_rules! on_every_store {
    ($($module:ident::$name:ident)*) => {
        mod memory { $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)] async fn $name() {
            super::$module::$name(crate::backend::memory()).await;
        })* }
        mod filesystem { $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)] async fn $name() {
            let (store, _folder) = crate::backend::filesystem();
            super::$module::$name(store).await;
        })* }
        mod s3 { $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)] async fn $name() {
            let Some(store) = crate::backend::s3(stringify!($name)) else { return };
            super::$module::$name(store).await;
        })* }
    };
}

on_every_store! {
    objects::what_is_put_is_read_whole_and_in_ranges
    objects::an_overwrite_replaces_the_whole_object
    objects::of_16_creators_one_wins_and_his_bytes_stay
    objects::a_list_is_complete_and_goes_by_segments
    objects::a_list_of_1100_objects_is_complete
    objects::a_deleted_object_is_gone_and_may_be_created_again
    objects::a_condition_on_the_etag_is_kept
    objects::users_of_every_kind_have_files_of_their_own
    objects::a_multipart_upload_appears_whole_or_not_at_all
    objects::a_copy_is_the_same_object_under_another_name
    objects::a_probe_leaves_nothing_behind
    creation::the_first_creator_is_told_so_and_later_ones_get_his_bytes
    creation::of_16_exact_creators_one_is_told_that_it_won
    streams::what_is_appended_is_replayed_in_order
    streams::a_fenced_writer_never_appends_again
    streams::a_fence_is_found_by_who_made_it_and_by_who_comes_later
    streams::what_was_acknowledged_beside_a_fence_is_replayed
    catalog::a_log_is_loaded_and_tailed_to_the_same_catalog
    catalog::of_16_writers_one_wins_each_number
    catalog::a_slow_reader_gets_past_trimmed_entries
    catalog::a_writer_that_wins_a_freed_number_steps_down
    catalog::an_entry_under_a_freed_number_is_applied_by_nobody
    catalog::a_log_of_another_history_is_neither_followed_nor_continued
    catalog::a_snapshot_that_gives_an_id_another_meaning_is_refused
    catalog::an_append_that_is_repeated_counts_once
    catalog::a_damaged_object_is_an_error
    parquet::keys_are_found_in_files_of_every_key_type
    parquet::a_file_that_is_not_what_its_entry_says_is_an_error
    truncation::an_object_of_a_stream_is_read_whole_or_not_at_all
    truncation::a_checkpoint_is_read_whole_or_not_at_all
    truncation::a_catalog_is_read_whole_or_not_at_all
    truncation::users_and_owners_are_read_whole_or_not_at_all
    truncation::a_data_file_is_read_whole_or_not_at_all
    users::what_is_put_is_loaded_and_followed
    users::writers_at_once_lose_nothing
    users::an_entry_that_cannot_be_read_is_never_no_users
}
