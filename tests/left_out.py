"""What an ordinary run leaves to `--all`, so that it stays near ten minutes: patterns of node ids below `tests/`.

Each line is long, and a shorter test of the ordinary run holds the same kind of thing; the comment says which. Measure
before adding a line: `./launch/test.sh --durations=60`.
"""

LEFT_OUT = (
    # the same bits or losses on other devices: training/test_exact, battery `eight_devices`, the faults' meshes
    "core/test_devices.py::test_lora_first_twenty_losses_are_equal",
    "core/test_devices.py::test_routed_first_step_is_equal_and_twenty_losses_are_near*",
    "engines/test_step.py::test_mixlora_with_gathered_experts",  # engines/test_equal
    # those with state, a carry, a pool or an FFN of their own stay
    *(f"battery/test_methods.py::test_eight_devices_equal_one[[]{name}]"
      for name in ("mola", "coe", "x_lora", "dynamic_moe", "dynmole", "loramoe", "llava_mole")),
    *(f"battery/test_methods.py::test_bfloat16_base_is_finite[[]{name}]"
      for name in ("mola", "coe", "x_lora", "dynamic_moe", "dynmole", "loramoe", "llava_mole", "rmoe")),
    # rows of the table that are one option away from another: the product runs each adapter, start and router
    *(
        f"battery/test_methods.py::{test}[[]{name}]"
        for test in ("test_equals_the_naive_form_in_value_and_gradient", "test_loss_falls_on_a_small_batch",
                     "test_the_start_is_the_base")
        for name in ("rslora", "dora", "pissa", "lora_plus", "lora_fa")
    ),
    "battery/test_bases.py::*[[]qwen3]",  # backbones/test_families: every family against transformers
    "battery/test_forms.py::test_jit_equals_eager[[]ffn]",
    "battery/test_forms.py::test_remat_changes_nothing[[]mixlora]",  # kernels/test_remat
    "backbones/test_experts_in_stack.py::*[[]q+down]",
    "battery/test_members.py::test_later_members_equal_those_written_out[[]mos-ffn-site]",
    # resume: `test_a_run_is_its_two_halves` has accumulation, noise and evaluation as well
    "training/test_loop.py::test_resume_is_bit_exact",
    "training/test_loop.py::test_router_state_passes_over_evaluations_stops_and_meshes",  # faults meshes, test_exact
    "training/test_loop.py::test_a_run_without_finite_gradients_gives_up[[]20-5]",
    "training/test_loop.py::test_warm_start_takes_the_router_state_along",  # `test_warm_start_recuts_segments`
    "training/test_loop.py::test_a_trace_needs_steps_and_never_costs_the_run",  # tests/test_profile
    "training/test_many.py::test_each_run_is_the_run_alone[[]mixlora]",  # lora, and test_group's mixlora
    "training/test_knobs.py::test_a_run_whose_random_base_followed_its_seed_goes_on_with_that_base",  # golden/test_v1
    "training/test_disk.py::test_a_failed_save_is_tried_again_between_the_save_steps",
    "training/test_exact.py::test_held_out_rows_and_the_first_state_have_the_same_bits",
    "golden/test_v1.py::test_it_goes_on_on_another_mesh[[]folder]",
    "acceptance/test_starts.py::*[[]x_lora]",
    # losses under accumulation: `test_exact_accumulation_is_the_whole_batch` and one method
    *(f"core/test_step.py::test_a_methods_losses_are_those_of_the_whole_batch[[]{name}]"
      for name in ("rmoe", "llava_mole", "dynmole", "coe")),
    "core/test_step.py::test_exact_accumulation_is_the_whole_batch[[]layer]",
    "core/test_step.py::test_exact_accumulation_is_the_whole_batch[[]all-soft]",
    "objectives/test_steps.py::test_four_micro_steps_are_the_whole_batch[[]reward]",
    "objectives/test_steps.py::test_four_micro_steps_are_the_whole_batch[[]distill]",
    "core/test_contracts.py::test_state_is_updated_once_a_step_on_global_sums*q*True]",
    "core/test_step.py::test_micro_accumulation_is_the_mean_of_the_micro_steps_and_no_more",
    "core/test_contracts.py::test_state_is_updated_once_a_step_on_global_sums*ffn*False]",
    # a router, an adapter and a start beside those that stay
    "training/test_moves.py::*[[]pissa]",
    "training/test_moves.py::*[[]vera]",
    "export/test_load.py::test_any_router_takes_them[[]top_p]",
    "export/test_load.py::test_any_router_takes_them[[]learned_threshold]",
    "export/test_load.py::test_experts_of_peft_say_what_peft_says[[]frozen]",  # trained: the same numbers
    # collectives: each engine once, and `tensor` with what travels
    "engines/test_hlo.py::test_tensor_parallelism_adds_no_wide_collective[[]mixlora-replicate]",
    "engines/test_hlo.py::test_tensor_parallelism_adds_no_wide_collective[[]mixlora-gather]",
    "engines/test_hlo.py::test_tensor_parallelism_adds_no_wide_collective[[]projections-all_to_all]",
    "engines/test_hlo.py::test_the_layer_scan_ships_what_the_formula_says[[]mixlora-replicate-dots]",
    "engines/test_hlo.py::test_the_layer_scan_ships_what_the_formula_says[[]mixlora-all_to_all-none]",
    "engines/test_hlo.py::test_the_layer_scan_ships_what_the_formula_says[[]dora-gather-full]",
    "engines/test_hlo.py::test_tensor_parallelism_adds_no_wide_collective[[]projections-replicate]",
    "engines/test_hlo.py::test_the_layer_scan_ships_what_the_formula_says[[]projections-all_to_all-dots]",
    # acceptance items that train a whole run, or build the method a second time
    "acceptance/test_x_lora.py::test_a_folder_that_is_no_run_of_plain_adapters_is_refused",
    "acceptance/test_x_lora.py::test_two_stages_train_experts_apart_and_then_the_head",
    "acceptance/test_mola.py::test_regrouped_layers_with_other_counts_equal_the_naive_form",
    "acceptance/test_mola.py::test_acceptance_4_padded_experts_change_nothing[[]projection]",
    "acceptance/test_lora_baselines.py::test_acceptance_5_lora_plus_in_a_run_compiles_once_and_finds_every_b",
    "acceptance/test_mos.py::test_acceptance_2_all_private_whole_vectors_train_as_plain_lora",
    "acceptance/test_mos.py::test_acceptance_3_pool_gradient_is_the_scatter_add_over_layers",
    "acceptance/test_loramoe.py::test_acceptance_7_weight_0_is_the_plain_dense_mixture",
    "acceptance/test_loramoe.py::test_acceptance_8_the_variance_is_of_the_global_batch",
    "acceptance/test_rmoe.py::test_acceptance_6_one_layer_needs_no_state",
    "acceptance/test_rmoe.py::test_padding_and_other_placements_carry_the_state_too",
    "acceptance/test_llava_mole.py::test_acceptance_7_a_token_works_for_one_expert_and_a_dense_one_for_all",
    "acceptance/test_llava_mole.py::test_acceptance_8_padding_does_not_change_the_balance_loss",
    "acceptance/test_dynmole.py::test_router_learns_from_the_language_model_through_the_gates",
    # kernels: NaN in place of inf and an A of its own in place of a shared one are the harder half
    "kernels/test_ops.py::*does_not_read_what_is_not_used*inf]",
    "kernels/test_ops.py::test_rank_gated_rows_without_a_gate_may_hold_anything*inf]",
    "kernels/test_ops.py::test_routed_ffn_with_a_base_of_true_and_false[[]reference-*",
    "kernels/test_ops.py::test_routed_ffn_with_a_base_of_true_and_false[[]tpu-nan-unused]",
    "kernels/test_ops.py::test_routed_ffn_dropout_shared_A_and_activation[[]gelu*tpu-nan]",
    "kernels/test_ops.py::test_shapes*many]",
    "evaluation/test_report.py::test_routing_pictures_of_every_shape",  # the report's own pictures
    "decode/test_generate.py::test_a_row_is_what_it_is_alone[[]dynamic_moe]",
    "decode/test_generate.py::test_cached_equals_uncached[[]dora]",
    "evaluation/test_load_run.py::test_gates_by_layer_over_segments_and_scopes",
    "core/test_routing.py::test_allowed_experts_take_all_of_the_probability[[]B*",
    "data/test_sources.py::test_the_default_mixture_packs_tightly",
    "decode/test_generate.py::test_cached_equals_uncached[[]dynamic_moe]",
    # a method whose own acceptance list compares it with its naive form; the battery's run takes those whose leaves lie
    # in a way of their own: an FFN, pools, a chain, a router's state, one choice for all layers, none at all
    *(f"battery/test_methods.py::{test}[[]{name}]"
      for test in ("test_equals_the_naive_form_in_value_and_gradient", "test_loss_falls_on_a_small_batch",
                   "test_the_start_is_the_base")
      for name in ("mola", "dynamic_moe", "dynmole", "loramoe", "llava_mole")),
    "battery/test_methods.py::test_equals_the_naive_form_in_value_and_gradient[[]nola]",  # acceptance/test_nola 3 and 6
    "battery/test_methods.py::test_equals_the_naive_form_in_value_and_gradient[[]vera]",  # the product runs it routed
    "battery/test_methods.py::test_bfloat16_base_is_finite[[]smora]",
    "battery/test_methods.py::test_bfloat16_base_is_finite[[]mos]",
    "battery/test_methods.py::test_eight_devices_equal_one[[]smora]",
    # of the product: each member of each axis once
    "battery/test_product.py::test_combination[[]lora-top_p-projection-kaiming]",
    "battery/test_product.py::test_combination[[]rslora-softmax_topk-projection-kaiming]",
    "battery/test_product.py::test_combination[[]dora-none-projection-pissa]",
    "battery/test_product.py::test_combination[[]rslora-none-ffn-kaiming]",
    # whole runs whose parts other runs have
    "training/test_many.py::test_each_run_is_the_run_alone_on_eight_devices*",  # one device, and engines/test_equal
    "acceptance/test_starts.py::*[[]smora]",  # acceptance/test_smora; a start is test_loop's
    "training/test_loop.py::test_stages_freeze_and_go_on",  # training/test_stages, core/test_step
    "golden/test_v1.py::test_it_goes_on_on_another_mesh[[]random]",  # it opens there; other meshes are rows of faults
    "backbones/test_experts_in_stack.py::*[[]ffn]",  # kernels/test_in_stack
    "acceptance/test_x_lora.py::test_acceptance_8_prefixes_keep_their_gates_and_a_cache_changes_nothing[[]options[01]]",
    "acceptance/test_rmoe.py::test_acceptance_2_the_second_layers_loss_reaches_the_first_projection[[]np]",
    *(f"acceptance/test_llava_mole.py::test_acceptance_3_*[[]{other}]" for other in ("dense", "gated")),  # the paper's
    "acceptance/test_dynamic_moe.py::test_acceptance_5_padded_form_equals_dense_and_clips_are_counted[[]up,down]",
    "modules/test_attach.py::test_plain_lora_equals_the_model_with_merged_kernels*'layers': 1*",  # its scan with remat
    "objectives/test_steps.py::test_four_micro_steps_are_the_whole_batch[[]classify]",
    "cases/test_zero_rows.py::test_the_loss_of_a_model_with_a_pruned_head[[]lora]",
    "engines/test_hlo.py::test_tensor_parallelism_adds_no_wide_collective[[]projections-gather]",
    "engines/test_hlo.py::test_tensor_parallelism_adds_no_wide_collective[[]lora-replicate]",
    "engines/test_hlo.py::test_the_layer_scan_ships_what_the_formula_says[[]four projections-*",
    "engines/test_hlo.py::test_the_layer_scan_ships_what_the_formula_says[[]mixlora-gather-none]",
    # the TPU's kernels, interpreted: against float64 and over several tiles, in value and gradient
    "kernels/test_ops.py::test_bfloat16[[]*-tpu-nan]",
    "kernels/test_ops.py::test_an_expert_without_tokens_has_a_gradient_of_exactly_zero[[]*-tpu-nan]",
    "kernels/test_ops.py::test_routed_ffn_with_a_base_of_true_and_false[[]dense-*",
    "kernels/test_ops.py::test_routed_ffn_with_a_base_of_true_and_false[[]tpu-nan-padded]",
    "kernels/test_ops.py::test_routed_ffn_dropout_shared_A_and_activation[[]*tpu-nan]",
    "kernels/test_ops.py::test_grouped_lora_does_not_read_what_is_not_used[[]tpu-nan-True-nan]",
    "kernels/test_ops.py::test_kernels_over_several_tiles[[]*-29-padded]",
    "decode/test_generate.py::test_cached_equals_uncached[[]base]",
    # notebooks, pages and models of the experiments: what they call has tests of its own
    "test_notebook.py::test_it_runs",  # evaluation/test_load_run `test_it_has_what_the_notebook_needs`
    "experiments/test_library.py::test_a_linen_minilm_equals_our_backbone_and_trains",  # the vision transformer
    # variants of a thing whose other variants run
    "kernels/test_ops.py::test_random_shapes*",  # test_shapes, test_kernels_over_several_tiles
    "kernels/test_ops.py::test_shapes[[]*-deep]",
    "kernels/test_ops.py::test_routed_ffn_with_a_base_of_true_and_false[[]tpu-nan-random]",
    "kernels/test_ops.py::test_rank_gated_rows_without_a_gate_may_hold_anything[[]tpu-nan-True-nan]",
    "kernels/test_ops.py::test_routed_ffn_dropout_shared_A_and_activation[[]gelu-*",
    *(f"battery/test_methods.py::{test}[[]{name}]"  # acceptance/test_smora and test_x_lora compare them too
      for test in ("test_equals_the_naive_form_in_value_and_gradient", "test_loss_falls_on_a_small_batch",
                   "test_the_start_is_the_base")
      for name in ("smora", "x_lora")),
    "acceptance/test_flexolmo.py::test_experts_of_other_routers_*[[]sigmoid_topk]",  # softmax_topk, x_lora
    "acceptance/test_kshot_experts.py::test_acceptance_6_*[[]False]",  # its pipeline trains experts
    "acceptance/test_flexolmo.py::test_acceptance_6_*[[][14]-*",  # k = 0 and 2
    *(f"battery/test_methods.py::{test}[[]{name}]"  # the acceptance list has the equation
      for test in ("test_equals_the_naive_form_in_value_and_gradient", "test_loss_falls_on_a_small_batch",
                   "test_the_start_is_the_base")
      for name in ("ld_mole", "goat", "comol", "meteora", "flexolmo", "kshot_experts")),
    *(f"battery/test_methods.py::{test}[[]moa_hetero]"  # its value and gradient stay, kinds lie as no other's
      for test in ("test_loss_falls_on_a_small_batch", "test_the_start_is_the_base")),
    "acceptance/test_moa_hetero.py::test_acceptance_5_a_masked*constant]",  # a token's own threshold
    "acceptance/test_moa_hetero.py::test_acceptance_10_a_cache_changes_nothing[[]options0]",  # the instance's
    "acceptance/test_dmoerm.py::test_acceptance_4_padding*[[]point]",
    "battery/test_product.py::test_combination[[]lora-none-projection-kaiming]",  # battery/test_methods, lora
    "engines/test_equal.py::test_equals_the_einsum[[]*ffn, E not a multiple of P]",  # all_to_all's projection
    "engines/test_equal.py::test_rank_space[[]ragged_all_to_all]",
    "core/test_contracts.py::test_carry_passes_layers_and_segments[[]*(3, 3, 3, 3)]",
    "core/test_contracts.py::test_carry_passes_layers_and_segments[[]*(2, 2, 5, 5)]",
    "core/test_contracts.py::test_a_shared_decision_is_taken_once_and_no_leaf_is_dead[[]model-('q', 'down')]",
    "core/test_contracts.py::test_a_shared_decision_is_taken_once_and_no_leaf_is_dead[[]ffn-*",
    *(f"backbones/test_families.py::test_a_kind[[]{kind}]"  # the reader's tests have each as a file
      for kind in ("rope llama3, 8192", "rope yarn, mscale", "rope yarn, attention_factor", "gelu_new", "relu",
                   "sliding window of the rows' length", "gemma2, no caps, both layers full", "gemma",
                   "gemma3, parameters by kind of layer", "phi3, longrope, short",
                   "sliding window from layer 1 (qwen2)",
                   "attention_bias (llama)")),
    "backbones/test_families.py::test_a_family[[]qwen2, untied-folder]",
    "backbones/test_families.py::test_a_family[[]qwen3, untied-folder]",
    "cases/test_mesh_axis.py::test_a_vocabulary_that_nothing_divides_gives_the_numbers_of_one_device*'tensor*",
    "kernels/test_in_stack.py::test_values_and_gradients_are_those_of_the_slices[[]*-False]",
    "backbones/test_others.py::test_outputs_and_gradients[[]qwen2_moe]",
    "training/test_stages.py::test_leaf_shapes_may_change_between_stages",  # warm start recuts segments
    "acceptance/test_lora_baselines.py::test_acceptance_1_start_leaves_the_function_unchanged[[]dora-kaiming-2e-06]",
    "acceptance/test_mola.py::test_acceptance_4_padded_experts_change_nothing[[]ffn]",
    "training/test_group.py::test_a_group_goes_on_bit_by_bit",
    "battery/test_members.py::test_later_members_equal_those_written_out[[]dora-ffn-site]",
    # LoRA's value and gradient under another optimizer or at the full rank, or held by an acceptance list of their own
    *(f"battery/test_methods.py::{test}[[]{name}]"
      for test in ("test_equals_the_naive_form_in_value_and_gradient", "test_the_start_is_the_base")
      for name in ("lora_pro", "allora", "dylora")),
    "battery/test_methods.py::test_loss_falls_on_a_small_batch[[]dylora]",
    *(f"battery/test_members.py::test_later_members_equal_those_written_out[[]{name}-*"
      for name in ("allora", "dylora", "adalora")),
    "core/test_kernels.py::test_routed_ffn[[](40,*-gelu-*",  # gelu of the first shape
    "core/test_kernels.py::test_routed_ffn[[](33,*-gelu-*",
    "core/test_kernels.py::test_routed_ffn[[](1,*-gelu-*",
    *(f"kernels/test_ops.py::test_against_float64[[]*tpu-plain-{kind}]" for kind in ("empty", "one", "unused")),  # nan
    "engines/test_hlo.py::test_the_layer_scan_ships_what_the_formula_says[[]chain-gather-dots]",  # chain-all_to_all
    "modules/test_engines.py::test_the_ffn_and_an_attached_model_equal_one_device[[]gather]",  # all_to_all
    "decode/test_generate.py::test_cached_equals_uncached[[]lora]",  # mixlora's adapters on attention have no router
    "backbones/test_families.py::test_a_family[[]qwen2, tied-*",  # llama and qwen3, tied
    "backbones/test_families.py::test_a_family[[]mistral, tied-*",
    "backbones/test_families.py::test_a_kind[[]rope llama3]",  # as a GGUF file
    "battery/test_product.py::test_combination[[]vera-softmax_topk-projection-kaiming]",  # battery/test_methods, vera
    "battery/test_product.py::test_combination[[]dora-softmax_topk-projection-kaiming]",  # dora-top_p-ffn
    *(f"battery/test_methods.py::test_loss_falls_on_a_small_batch[[]{name}]"  # their gradients are the naive form's
      for name in ("nola", "randlora", "vera")),
    "acceptance/test_moe_surveys.py::test_acceptance_8_*[[]many]",  # engines/test_equal
    "acceptance/test_lora_mixer.py::test_acceptance_2_and_6_*[[]state space]",  # attention
    "acceptance/test_moa_hetero.py::test_acceptance_6_gathered_and_dense_masked_forms_agree",  # battery/test_methods
    "training/test_moves.py::*[[]bert]",  # backbones/test_whole_runs
    "backbones/test_moe.py::test_eight_devices_under_every_engine[[]all_to_all-*-shared_outer]",  # test_gpt_oss
    "backbones/test_mamba.py::test_eight_devices_equal_one[[]all_to_all]",  # fsdp
    "kernels/test_moe_ffn.py::test_values_and_gradients[[]('B_g', 'B_u')-gelu]",  # B_g, B_u and A_d; gelu in test_ops
    "training/test_moves.py::*[[]ffn]",  # the chain's experts are FFNs
    "acceptance/test_rmoe.py::test_acceptance_2_the_second_layers_loss_*[[]detach]",  # full is the paper's
    "acceptance/test_moa_hetero.py::test_acceptance_10_a_cache_changes_nothing*",  # decode/test_generate, stelocoder
    "acceptance/test_kshot_experts.py::test_acceptance_6_*",  # its pipeline trains gates
    "battery/test_product.py::test_combination[[]rslora-top_p-projection-pissa]",  # dora-top_p-ffn, lora-pissa
    "engines/test_quantised.py::test_a_projection_on_eight_devices[[]*-down-512]",  # q and down of 192 cut blocks
    "acceptance/test_x_lora.py::test_acceptance_8_*[[]options2]",  # a router for each site, and one for the model
    # a method's whole run: its items, and runs of training/ and regimes/, hold the parts
    "acceptance/test_dmoerm.py::test_a_run_of_three_phases_gives_rewards",
    "acceptance/test_dmoerm.py::test_acceptance_7_the_outer_router_is_measured_on_prompts_of_its_own",
    "acceptance/test_flexolmo.py::test_plain_runs_are_joined_by_documents_and_one_is_left_out",
    "acceptance/test_flexolmo.py::test_acceptance_2_owners_in_one_run_do_not_meet",
    "acceptance/test_x_lora.py::test_experts_from_other_runs_are_exactly_those_runs",  # acceptance/test_lora_mixer 2
    "acceptance/test_mora_cl.py::test_a_run_opens_experts_task_by_task_and_never_moves_those_of_others",
    "acceptance/test_mora_cl.py::test_a_bank_that_was_stopped_ends_with_the_same_bits*",
    "acceptance/test_lora_mixer.py::test_acceptance_7_a_run_is_held_to_where_its_first_stage_ended",
    "acceptance/test_meteora.py::test_acceptance_5_loaded_adapters_*",
    "regimes/test_toy.py::test_what_a_regime_keeps_of_the_state_survives_the_next_step",  # regimes/test_killed
    "training/test_moves.py::*[[]base_experts]",  # backbones/test_moe has every gradient
    # a method on eight devices, with a cache, or in micro-steps: one of each kind stays
    "acceptance/test_meteora.py::test_one_generation_changes_adapters_and_a_cache_changes_nothing",  # stelocoder
    "acceptance/test_lora_pro.py::test_a_mixture_on_eight_devices_*",
    "acceptance/test_adalora.py::test_eight_devices_choose_as_one_does",
    "acceptance/test_ffa_lora.py::test_routed_A_stays_*",
    "acceptance/test_deepseek_moe.py::test_acceptance_7_experts_on_eight_devices_equal_one",  # engines/test_equal
    "objectives/test_steps.py::test_rewards_of_experts_in_micro_steps_and_on_four_devices[[]fused]",  # dmoerm 3
    "core/test_step.py::test_a_methods_losses_are_those_of_the_whole_batch*",  # `test_exact_accumulation_*`
    "export/test_walk.py::*",  # export/test_load and test_formats have each step
    "modules/test_attach.py::test_plain_lora_equals_the_model_with_merged_kernels*'axes'*",
    "modules/test_attach.py::test_a_scanned_stack_is_its_layers_one_by_one",  # the scan of test_docs' page
    "acceptance/test_mos.py::test_experts_are_instances_of_their_own",
    "acceptance/test_allora.py::test_a_routed_ffn_has_the_gradients_of_materialised_experts",  # kernels/test_ops
    "acceptance/test_dynamic_moe.py::test_acceptance_5_padded_form_equals_dense_*",  # mola's, and kernels/test_ops
    "acceptance/test_moa_hetero.py::test_acceptance_5_a_masked_threshold_*",  # 4 has both ends of it
    "acceptance/test_randlora.py::test_acceptance_1_the_first_step_moves_lambda_alone[[]up]",
    "experiments/test_lowrank.py::test_it_goes_on_from_its_file",  # test_compared, test_leaderboard
    "training/test_disk.py::test_a_disk_that_stays_full_keeps_the_newest_step_and_is_an_error*",  # faults saves.run
    # the acceptance list has the equation, in value and gradient
    *(f"battery/test_methods.py::{test}[[]{name}]"
      for test in ("test_equals_the_naive_form_in_value_and_gradient", "test_loss_falls_on_a_small_batch",
                   "test_the_start_is_the_base")
      for name in ("adamole", "mora_cl", "hydralora", "flylora", "adalora")),
    "battery/test_bases.py::test_equals_the_naive_form[[]untied]",  # backbones/test_families, against transformers
    "experiments/test_compared.py::test_every_row_chooses_its_rate_*",  # test_leaderboard goes on from its file too
    "io/test_base.py::test_processes_that_convert_at_once",  # faults writers.cache
    "training/test_loop.py::test_a_damaged_step_is_skipped_by_name",  # faults damage.checkpoint
    "acceptance/test_llava_mole.py::test_acceptance_2_equal_experts_make_the_router_irrelevant",  # mixlora's
    "acceptance/test_meteora.py::test_acceptance_5_gates_learn_from_both_losses_*[[]1]",
    "acceptance/test_moa_hetero.py::test_acceptance_1_weights_of_1_are_plain_lora",  # battery/test_methods
    "acceptance/test_lora_mixer.py::test_acceptance_7_a_kill_in_stage_b_changes_no_bit*",  # regimes/test_killed
    "battery/test_product.py::test_combination[[]lora-softmax_topk-ffn-pissa]",  # dora-top_p-ffn
    "training/test_moves.py::*[[]projection]",  # the chain's sites, and battery/test_methods has every gradient
    "training/test_stages.py::test_a_run_with_modules_goes_on_bit_by_bit_*[[]classify]",  # regimes/test_killed
    "training/test_stages.py::test_a_step_of_an_older_version_at_a_stages_end_*",  # golden/test_v1 opens older runs
    "acceptance/test_kshot_experts.py::test_the_pipeline_picks_and_tunes",  # each of its steps above it
    "serving/test_slots.py::test_answers_are_those_of_generate",  # serving/test_engine
    "backbones/test_mamba.py::test_eight_devices_equal_one[[]fsdp]",  # test_rows and test_gpt_oss on eight devices
    "training/test_disk.py::test_a_disk_that_is_full_for_a_while_*first save]",  # the faults' saves.run
    "engines/test_hlo.py::test_the_layer_scan_ships_what_the_formula_says[[]chain-*",  # mixlora under the same engine
    "engines/test_base_experts.py::test_the_layer_scan_ships_what_the_formula_says[[]all_to_all-None]",  # gather
    "acceptance/test_flexolmo.py::test_experts_of_other_routers_*[[]x_lora]",  # goat, softmax_topk
    "acceptance/test_lora_baselines.py::test_acceptance_1_start_leaves_the_function_unchanged[[]lora-pissa-*",  # dora
    # one of each pair of options that meet nowhere
    *(f"engines/test_seam.py::test_a_placement_in_one_file_is_served_by_every_engine[[]{engine}-6-sizes1]"
      for engine in ("ragged_all_to_all", "replicate", "gather", "toy")),  # all_to_all, and 8 experts under each
    "core/test_kernels.py::test_routed_ffn[[](33,*-tiled]",  # dense there, tiled at the other shapes
    "core/test_kernels.py::test_routed_ffn[[](17,*-gelu-*",  # gelu in kernels/test_ops
    "kernels/test_ops.py::test_against_float64[[]*-tpu-plain-random]",  # nan
    "kernels/test_moe_ffn.py::test_values_and_gradients[[]()-clamped]",  # backbones/test_gpt_oss
    "core/test_quant.py::test_experts_are_read_one_by_one_from_their_codes[[]nf4-tiled]",
    "core/test_quant.py::test_experts_are_read_one_by_one_from_their_codes[[]int8-ragged]",
    "engines/test_quantised.py::test_experts_on_eight_devices[[]nf4-replicate]",
    "engines/test_quantised.py::test_experts_on_eight_devices[[]int8-all_to_all]",
    *(f"export/test_families.py::test_a_gguf_adapter_added_to_the_bases_file_is_the_run[[]{name}]"
      for name in ("smollm3", "gemma", "olmo2")),  # phi3, gemma2 and gemma3
    *(f"backbones/test_families.py::test_a_kind[[]{kind}]"  # the reader's tests have each as a file
      for kind in ("rope linear", "rope yarn", "gelu", "sliding window by layer_types (qwen3)")),
    *(f"io/test_templates.py::test_a_bomb_is_stopped_and_named_*[[]{name}]"  # a child process each; fifteen stay
      for name in ("loops that write", "nested lists", "indent", "join", "wordwrap", "a power in one call")),
    # one of two halves of a thing: the harder one, or the one that has the other's parts, stays
    "backbones/test_families.py::test_a_kind[[]rope dynamic]",  # beyond the context
    "backbones/test_families.py::test_a_kind[[]smollm3]",  # without positions in every second layer
    "backbones/test_families.py::test_a_kind[[]phi3]",  # phi3, longrope, long
    "backbones/test_families.py::test_a_kind[[]attention_bias (qwen3)]",  # attention_bias (llama) as a GGUF file
    "kernels/test_ops.py::test_routed_ffn_dropout_shared_A_and_activation[[]relu-tiled]",  # relu-dense
    "kernels/test_ops.py::test_routed_ffn_dropout_shared_A_and_activation[[]gelu_tanh-dense]",  # gelu_tanh-tiled
    "kernels/test_ops.py::test_routed_ffn_dropout_shared_A_and_activation[[]silu-dense]",  # relu-dense
    "engines/test_seam.py::test_an_engine_in_one_file_serves_every_placement[[]chain]",  # its passes are the FFN's
    "engines/test_equal.py::test_capacity_drops_and_counts[[]ffn-ragged_all_to_all]",  # projection, ffn-all_to_all
    "modules/test_layers.py::test_no_token_gives_no_row[[](2, 0)]",  # (0, 5) and (0,)
    "battery/test_product.py::test_shapes_of_every_combination[[]rslora-*",  # lora's, times another number
    "battery/test_members.py::test_later_members_equal_those_written_out[[]rslora-*",
    # a router decides without the adapter: each with lora, and those with a state, a carry or a gate of the base's own
    *(f"battery/test_product.py::test_shapes_of_every_combination[[]dora-{router}-*"
      for router in ("entropy_hybrid", "top1", "sparse_projection", "soft_topk", "biased_topk", "sparsegen",
                     "learned_threshold", "labelled_topk", "sigmoid_threshold")),
    # whose values `test_combination` has
    "battery/test_product.py::test_shapes_of_every_combination[[]dora-top_p-ffn-kaiming]",
    "objectives/test_formulas.py::test_chunks_of_the_vocabularys_distribution_change_nothing*-1]",  # chunks of 4
    # on the other block: attention, and the gates by task on both
    "acceptance/test_lora_mixer.py::test_acceptance_1_and_6_other_experts_and_the_router_*[[]state space]",
    "acceptance/test_lora_mixer.py::test_acceptance_3_and_6_*[[]state space]",
    # the acceptance list has value and gradient, or the method is LoRA from another start
    *(f"battery/test_methods.py::{test}[[]{name}]"
      for test in ("test_equals_the_naive_form_in_value_and_gradient", "test_loss_falls_on_a_small_batch",
                   "test_the_start_is_the_base")
      for name in ("lora_ga", "lora_sb", "randlora", "coe", "deepseek_moe")),
    "modules/test_docs.py::test_the_page_runs",  # the README's section runs, and the example of each module
    "test_launch_flags.py::test_exit_status[[][[]'--workdir=w'*",  # the other flag that is missing
    "test_launch_flags.py::test_exit_status[[][[]'--config=absent.py'*",  # test_bad_input's exit status
    "core/test_contracts.py::test_carry_passes_layers_and_segments[[]q,down-*",  # ffn
    "battery/test_methods.py::test_loss_falls_on_a_small_batch[[]allora]",  # acceptance/test_allora 2 and 3
    "kernels/test_ops.py::test_shapes[[]*-tpu-nan-one]",  # test_against_float64, `one`; E = 1 in the other forms
    "engines/test_equal.py::test_dropout_does_not_depend_on_the_engine[[]ffn]",  # projection; engines/test_seam's FFN
    # other values of a test's parameter stay
    "acceptance/test_mora_cl.py::test_acceptance_5_the_bank_*[[]1]",  # 2 and 3
    "acceptance/test_mora_cl.py::test_acceptance_7_a_bank_with_a_mask_*[[]1]",  # 2 and 3
    "acceptance/test_moa_hetero.py::test_kinds_at_one_projection_*[[]kinds1]",  # kinds0
    "acceptance/test_lora_baselines.py::test_acceptance_1_start_*[[]rslora-kaiming-0]",  # lora, and rslora in 3
)  # fmt: skip
