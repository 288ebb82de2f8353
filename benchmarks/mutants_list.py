"""The mutants of benchmarks/mutants.py: each a slip that is easy to make and hard to see.

A slip is of one place: the old text occurs once in its file. `tests` are the narrowest that have to
notice it, in the form of pytest's own arguments, without the directory. Where the code changes, the
text follows it; where a slip could not matter, it is not here.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """name: unique. file: from the root of the tree. slips: what goes wrong, in words."""

    name: str
    file: str
    old: str
    new: str
    slips: str
    tests: tuple[str, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """pytest's arguments, from the root of the tree."""
        return tuple(f"tests/{test}" for test in self.tests)


def _of(file: str, *slips: tuple[str, ...]) -> tuple[Mutant, ...]:
    """Mutants of one file, each (name, what slips, old, new, *tests)."""
    return tuple(
        Mutant(name=name, file=f"gopd_jax/{file}", slips=what, old=old, new=new, tests=tuple(tests))
        for name, what, old, new, *tests in slips
    )


MUTANTS = (
    *_of(
        "objectives/advantages.py",
        (
            "log-u-clip-forgotten",
            "the clip of log u does not reach the reward",
            "clipped(log_u_BT, mask_BT, clip=clip))",
            "clipped(log_u_BT, mask_BT))",
            "test_gopd.py::test_a_clip_of_log_u_comes_before_the_divergence",
        ),
        (
            "log-u-clip-one-sided",
            "log u is clipped from above alone",
            "return jnp.clip(log_u_BT, -clip, clip)",
            "return jnp.minimum(log_u_BT, clip)",
            "test_gopd.py::test_a_clip_of_log_u_comes_before_the_divergence",
        ),
        (
            "log-u-mask-forgotten",
            "rewards are read where there is no token",
            "    log_u_BT = jnp.where(mask_BT, log_u_BT, 0.0)\n",
            "",
            "test_gopd.py::test_a_clip_of_log_u_comes_before_the_divergence",
        ),
        (
            "log-u-clip-of-zero",
            "< for <=: a clip of 0 nats, which leaves no reward, is not refused",
            "if not clip > 0:",
            "if not clip >= 0:",
            "test_gopd.py::test_a_clip_of_log_u_comes_before_the_divergence",
        ),
    ),
    *_of(
        "objectives/baselines.py",
        (
            "batch-mean-of-itself",
            "the mean over the batch includes the row itself",
            "_mean(total_B.sum() - total_B, count_B.sum() - count_B)",
            "_mean(total_B.sum() + 0 * total_B, count_B.sum() + 0 * count_B)",
            "test_objective_tables.py::test_means_are_blind_to_the_row_itself[batch_mean]",
        ),
        (
            "batch-mean-count-of-itself",
            "the number of tokens includes the row itself, their sum does not",
            "count_B.sum() - count_B)",
            "count_B.sum() + 0 * count_B)",
            "test_baselines.py::test_baselines_of_other_rows_are_numpys[batch_mean]",
        ),
        (
            "batch-mean-of-rows",
            "a mean over rows for one over tokens",
            "total_B, count_B = _sums(credit_BT, mask_BT)\n    mean_B",
            "total_B = _mean(*_sums(credit_BT, mask_BT))\n"
            "    count_B = mask_BT.any(1).astype(jnp.float32)\n    mean_B",
            "test_baselines.py::test_baselines_of_other_rows_are_numpys[batch_mean]",
        ),
        (
            "position-mean-along-rows",
            "the sum is over a row's positions instead of over rows",
            "credit_BT.sum(0) - credit_BT",
            "credit_BT.sum(1, keepdims=True) - credit_BT",
            "test_baselines.py::test_baselines_of_other_rows_are_numpys[position_mean]",
        ),
        (
            "position-mean-mask-forgotten",
            "credits count where there is no token",
            "    credit_BT = jnp.where(mask_BT, credit_BT, 0.0)\n    count_T",
            "    count_T",
            "test_objective_tables.py::test_entries_over_rows_are_zero_off_the_mask"
            "_and_read_nothing_there[position_mean]",
        ),
        (
            "leave-one-out-of-itself",
            "the group's mean includes the row itself",
            "_mean(sum_B - row_B, rows_B - there_B)",
            "_mean(sum_B, rows_B)",
            "test_objective_tables.py::test_means_are_blind_to_the_row_itself[leave_one_out]",
        ),
        (
            "leave-one-out-of-the-batch",
            "the mean is over the other rows of the batch, not of the group",
            "    sum_B = jax.ops.segment_sum(row_B, group_B, n_rows)[group_B]\n"
            "    rows_B = jax.ops.segment_sum(there_B, group_B, n_rows)[group_B]\n",
            "    sum_B, rows_B = row_B.sum(), there_B.sum()\n",
            "test_baselines.py::test_baselines_of_other_rows_are_numpys[leave_one_out]",
        ),
        (
            "leave-one-out-counts-empty-rows",
            "rows without tokens count as rows of credit 0",
            "(count_B > 0).astype(jnp.float32)",
            "jnp.ones_like(count_B)",
            "test_baselines.py::test_baselines_of_other_rows_are_numpys[leave_one_out]",
        ),
        (
            "local-kl-sign",
            "KL for -KL: the baseline doubles what it is to take out",
            "jnp.where(mask_BT, -local_kl_BT, 0.0)",
            "jnp.where(mask_BT, local_kl_BT, 0.0)",
            "test_credit.py::test_the_local_kl_is_the_mean_of_immediate_credit_at_each_state",
        ),
        (
            "group-relative-not-centred",
            "the root mean square for the standard deviation",
            "group_mean(centred_B**2)",
            "group_mean(reward_B**2)",
            "test_objective_tables.py::test_group_relative_is_numpys",
        ),
        (
            "group-relative-over-the-batch",
            "the group's sum is the batch's",
            "total_B = jax.ops.segment_sum(values_B, group_B, n_rows)",
            "total_B = jnp.full(n_rows, values_B.sum())",
            "test_objective_tables.py::test_group_relative_is_numpys",
        ),
        (
            "mean-of-nobody",
            "0 / 0 where there is nobody to compare with",
            "jnp.where(count > 0, total / jnp.maximum(count, 1.0), 0.0)",
            "total / count",
            "test_baselines.py::test_a_row_with_nobody_to_compare_with_has_baseline_zero",
        ),
    ),
    *_of(
        "objectives/credit.py",
        (
            "immediate-mask-forgotten",
            "rewards are read where there is no token",
            "return jnp.where(mask_BT, token_reward_BT, 0.0)",
            "return token_reward_BT",
            "test_objective_tables.py::test_entries_over_rows_are_zero_off_the_mask"
            "_and_read_nothing_there[immediate]",
        ),
        (
            "return-to-go-discounted",
            "a discount where there is none",
            "return discounted(token_reward_BT, mask_BT, gamma=1.0)",
            "return discounted(token_reward_BT, mask_BT, gamma=0.99)",
            "test_credit.py::test_return_to_go_has_no_bias",
        ),
        (
            "k-step-discount-forgotten",
            "later rewards of a window count in full",
            "return gamma**n * jnp.pad(",
            "return jnp.pad(",
            "test_credit.py::test_sums_are_numpys[2-0.5]",
        ),
        (
            "k-step-one-more",
            "k + 1 terms for k",
            "min(int(k), n_positions)",
            "min(int(k) + 1, n_positions)",
            "test_credit.py::test_sums_are_numpys[2-0.5]",
        ),
        (
            "k-step-window-shifted",
            "a window is added where another one begins",
            "total_BT + later(window_BT, covered)",
            "total_BT + later(window_BT, width)",
            "test_credit.py::test_sums_are_numpys[3-0.5]",
        ),
        (
            "gae-value-not-shifted",
            "V(s_t) for V(s_{t+1})",
            "next_BT = jnp.pad(value_BT[:, 1:], ((0, 0), (0, 1)))",
            "next_BT = value_BT",
            "test_credit.py::test_gae_is_the_recursion_of_the_paper",
        ),
        (
            "gae-bootstraps-ended-rows",
            "V behind the last token counts where a row ended, not where it was cut off",
            "last_BT & ~ended_B[:, None]",
            "last_BT & ended_B[:, None]",
            "test_credit.py::test_a_truncated_row_goes_on_with_the_value_where_it_was_cut[1.0-0.5]",
        ),
        (
            "gae-bootstraps-nothing",
            "a row that was cut off is worth nothing behind its last token",
            "after_BT = jnp.where(last_BT & ~ended_B[:, None], bootstrap_B[:, None], next_BT)",
            "after_BT = next_BT",
            "test_credit.py::test_a_truncated_row_goes_on_with_the_value_where_it_was_cut[1.0-0.5]",
        ),
        (
            "gae-value-undiscounted",
            "gamma is left out of delta",
            "gamma * after_BT - value_BT",
            "after_BT - value_BT",
            "test_credit.py::test_gae_is_the_recursion_of_the_paper",
        ),
        (
            "gae-lambda-forgotten",
            "deltas are summed with gamma alone",
            "_discounted_sum(delta_BT, mask_BT, gamma * lam)",
            "_discounted_sum(delta_BT, mask_BT, gamma)",
            "test_credit.py::test_gae_is_the_recursion_of_the_paper",
        ),
        (
            "gae-without-its-value",
            "V(s_t) is not subtracted",
            "gamma * after_BT - value_BT",
            "gamma * after_BT",
            "test_credit.py::test_gae_with_the_exact_value_has_no_bias_whatever_lambda[0.95]",
        ),
        (
            "sums-run-forward",
            "rewards before the token, not after it",
            "axis=1, reverse=True",
            "axis=1",
            "test_credit.py::test_return_to_go_has_no_bias",
        ),
        (
            "sums-run-over-rows",
            "the scan is along the batch",
            "axis=1, reverse=True",
            "axis=0, reverse=True",
            "test_credit.py::test_sums_are_numpys[9-0.5]",
        ),
        (
            "sums-discount-of-the-other",
            "what comes late is discounted by its own length, not by what lies before it",
            "early[1] + early[0] * late[1]",
            "early[1] + late[0] * late[1]",
            "test_credit.py::test_sums_are_numpys[9-0.5]",
        ),
    ),
    *_of(
        "objectives/distributional.py",
        (
            "exact-arguments-swapped",
            "D(T || S) for D(S || T)",
            "divergence(log_s_xS, log_t_xS)",
            "divergence(log_t_xS, log_s_xS)",
            "test_distributional.py::test_the_logit_gradient_is_the_centred_corrected_advantage"
            "[reverse_kl]",
        ),
        (
            "exact-mean-for-sum",
            "a mean over the vocabulary, which is no divergence",
            "divergence(log_s_xS, log_t_xS), 0.0).sum(-1)",
            "divergence(log_s_xS, log_t_xS), 0.0).mean(-1)",
            "test_distributional.py::test_the_logit_gradient_is_the_centred_corrected_advantage"
            "[reverse_kl]",
        ),
        (
            "exact-mask-outside-alone",
            "junk of the support reaches the gradient as 0 times it",
            "(jnp.where(valid_xS, x, 0.0) for x in (student_xS, target_xS))",
            "(student_xS, target_xS)",
            "test_loss_tables.py::test_losses_read_only_what_is_valid_of_a_support[nan-exact]",
        ),
        (
            "entropy-gate-of-the-student",
            "student for target in the gate",
            "target_V = jnp.where(real_xV, target_xV, 0.0)",
            "target_V = jnp.where(real_xV, student_xV, 0.0)",
            "test_distributional.py::test_forward_kl_is_added_where_the_targets_entropy_is_above"
            "_the_threshold",
        ),
        (
            "entropy-gate-sign",
            "sum p log p for the entropy",
            "entropy_x = -jnp.where(",
            "entropy_x = jnp.where(",
            "test_distributional.py::test_forward_kl_is_added_where_the_targets_entropy_is_above"
            "_the_threshold",
        ),
        (
            "entropy-gate-always-open",
            "forward KL is added everywhere",
            "seeking_x + jnp.where(uncertain_x, weight * covering_x, 0.0)",
            "seeking_x + weight * covering_x",
            "test_distributional.py::test_forward_kl_is_added_where_the_targets_entropy_is_above"
            "_the_threshold",
        ),
        (
            "entropy-gate-weight-forgotten",
            "forward KL counts in full",
            "jnp.where(uncertain_x, weight * covering_x, 0.0)",
            "jnp.where(uncertain_x, covering_x, 0.0)",
            "test_distributional.py::test_forward_kl_is_added_where_the_targets_entropy_is_above"
            "_the_threshold",
        ),
        (
            "entropy-gate-over-the-students-ids",
            "the student's likeliest ids for the target's",
            'of="teacher")',
            'of="student")',
            "test_distributional.py::test_forward_kl_of_the_gate_is_over_the_targets_likeliest"
            "_and_a_bucket",
        ),
        (
            "ratio-gate-with-a-gradient",
            "missing stop_gradient: the gate learns to close",
            "jax.lax.stop_gradient(target_x - logp_x)",
            "(target_x - logp_x)",
            "test_distributional.py::test_the_ratio_gate_mixes_the_two_kls_by_the_sampled_token"
            "[1.0]",
        ),
        (
            "ratio-gate-swapped",
            "forward KL where the student likes the token more",
            "g_x * forward_x + (1.0 - g_x) * reverse_x",
            "g_x * reverse_x + (1.0 - g_x) * forward_x",
            "test_distributional.py::test_the_ratio_gate_mixes_the_two_kls_by_the_sampled_token"
            "[1.0]",
        ),
        (
            "ratio-gate-temperature-forgotten",
            "the gate is as sharp at every temperature",
            "(target_x - logp_x) / temperature)",
            "(target_x - logp_x))",
            "test_distributional.py::test_the_ratio_gate_mixes_the_two_kls_by_the_sampled_token"
            "[3.0]",
        ),
    ),
    *_of(
        "objectives/divergences.py",
        (
            "reverse-kl-sign",
            "-KL(S || T)",
            "return jnp.exp(log_s) * (log_s - log_t)",
            "return jnp.exp(log_s) * (log_t - log_s)",
            "test_divergences.py::test_values_and_corrected_advantages_are_the_closed_forms"
            "[reverse_kl]",
        ),
        (
            "forward-kl-weighed-by-the-student",
            "student for teacher as the measure",
            "return jnp.exp(log_t) * (log_t - log_s)",
            "return jnp.exp(log_s) * (log_t - log_s)",
            "test_divergences.py::test_values_and_corrected_advantages_are_the_closed_forms"
            "[forward_kl]",
        ),
        (
            "log-of-mixture",
            "the mixture of logs for the log of the mixture",
            "return jnp.logaddexp(math.log(weight) + log_t, math.log1p(-weight) + log_s)",
            "return weight * log_t + (1 - weight) * log_s",
            "test_divergences.py::test_values_and_corrected_advantages_are_the_closed_forms[jsd]",
        ),
        (
            "jsd-weights-swapped",
            "beta weighs the student's part",
            "return beta * by_teacher + (1 - beta) * jnp.exp",
            "return (1 - beta) * by_teacher + beta * jnp.exp",
            "test_divergences.py::test_values_and_corrected_advantages_are_the_closed_forms",
        ),
        (
            "skew-reverse-of-the-student",
            "alpha is the teacher's share of the mixture",
            '_log_mixture(log_s, log_t, 1 - alpha, "skew_reverse',
            '_log_mixture(log_s, log_t, alpha, "skew_reverse',
            "test_divergences.py::test_values_and_corrected_advantages_are_the_closed_forms"
            "[skew_reverse]",
        ),
        (
            "pearson-inverted",
            "s^2 / t for t^2 / s",
            "jnp.exp(2 * log_t - log_s)",
            "jnp.exp(2 * log_s - log_t)",
            "test_divergences.py::test_values_and_corrected_advantages_are_the_closed_forms"
            "[pearson]",
        ),
        (
            "total-variation-doubled",
            "the half is forgotten",
            "return gap * jnp.sign(gap) / 2",
            "return gap * jnp.sign(gap)",
            "test_divergences.py::test_values_and_corrected_advantages_are_the_closed_forms"
            "[total_variation]",
        ),
        (
            "alpha-weights-swapped",
            "alpha weighs the student's probability",
            "alpha * jnp.exp(log_t) + (1 - alpha) * jnp.exp(log_s)",
            "(1 - alpha) * jnp.exp(log_t) + alpha * jnp.exp(log_s)",
            "test_divergences.py::test_values_and_corrected_advantages_are_the_closed_forms",
        ),
        (
            "mixture-weights-forgotten",
            "parts are added up unweighed",
            "sum(weight * part for",
            "sum(part for",
            "test_divergences.py::test_values_and_corrected_advantages_are_the_closed_forms"
            "[mixture]",
        ),
        (
            "token-reward-sign",
            "f(u) for -f(u): the update climbs the divergence",
            "return -divergence(jnp.zeros_like(log_u), log_u)",
            "return divergence(jnp.zeros_like(log_u), log_u)",
            "test_gopd.py::test_the_token_reward_of_g_opd_is_the_papers",
        ),
        (
            "correction-not-centred",
            "f'(1) is not subtracted",
            "return _slope(divergence, log_u) - _slope(divergence, jnp.zeros_like(log_u))",
            "return _slope(divergence, log_u)",
            "test_divergences.py::test_reward_and_correction_add_up_to_the_corrected_advantage",
        ),
        (
            "corrected-sign",
            "the corrected advantage is upside down",
            "return by_log_s(jnp.zeros_like(log_u)) - by_log_s(log_u)",
            "return by_log_s(log_u) - by_log_s(jnp.zeros_like(log_u))",
            "test_divergences.py::test_values_and_corrected_advantages_are_the_closed_forms"
            "[reverse_kl]",
        ),
    ),
    *_of(
        "objectives/gates.py",
        (
            "trust-unbounded",
            "tokens that the teacher likes more count above 1",
            "jnp.exp(jnp.minimum(log_u_BT, 0.0))",
            "jnp.exp(log_u_BT)",
            "test_sampled_losses.py::test_gates_by_hand",
        ),
        (
            "first-one-more",
            "<= for <: n + 1 tokens",
            "position_BT < n)",
            "position_BT <= n)",
            "test_sampled_losses.py::test_gates_by_hand",
        ),
        (
            "skip-end-inverted",
            "the end alone is trained",
            "_where(mask_BT, ~end_BT)",
            "_where(mask_BT, end_BT)",
            "test_sampled_losses.py::test_gates_by_hand",
        ),
        (
            "entropy-bound-exclusive",
            "< for <=",
            "teacher_entropy_BT <= at_most",
            "teacher_entropy_BT < at_most",
            "test_sampled_losses.py::test_gates_by_hand",
        ),
        (
            "agree-drops-zeros",
            "> for >=: tokens without an advantage are gated",
            "advantage_BT >= 0, advantage_BT <= 0",
            "advantage_BT > 0, advantage_BT < 0",
            "test_sampled_losses.py::test_tokens_stay_where_the_verifier_agrees_with_their"
            "_advantage",
        ),
        (
            "drift-of-e",
            "a decay by e per half-life",
            "jnp.exp2(-position_BT",
            "jnp.exp(-position_BT",
            "test_sampled_losses.py::test_gates_by_hand",
        ),
        (
            "gates-mask-forgotten",
            "gates are open where there is no token",
            "return jnp.where(mask_BT, weight_BT, 0).astype(jnp.float32)",
            "return jnp.asarray(weight_BT).astype(jnp.float32)",
            "test_sampled_losses.py::test_gates_by_hand",
        ),
    ),
    *_of(
        "objectives/importance.py",
        (
            "ratio-inverted",
            "sampler / student for student / sampler",
            "student_BT - sampler_BT, 0.0)\n    return jax.lax",
            "sampler_BT - student_BT, 0.0)\n    return jax.lax",
            "test_sampled_losses.py::test_importance_weights_by_hand",
        ),
        (
            "row-ratio-mean-for-sum",
            "the geometric mean over all positions for the product over tokens",
            "student_BT - sampler_BT, 0.0).sum(1, keepdims=True)",
            "student_BT - sampler_BT, 0.0).mean(1, keepdims=True)",
            "test_sampled_losses.py::test_importance_weights_by_hand",
        ),
        (
            "row-ratio-over-the-batch",
            "wrong axis: a product over rows",
            "student_BT - sampler_BT, 0.0).sum(1, keepdims=True)",
            "student_BT - sampler_BT, 0.0).sum(0, keepdims=True)",
            "test_sampled_losses.py::test_importance_weights_by_hand",
        ),
        (
            "importance-cap-forgotten",
            "weights without a bound",
            "jnp.minimum(jnp.exp(log_w), cap)",
            "jnp.exp(log_w)",
            "test_sampled_losses.py::test_importance_weights_by_hand",
        ),
        (
            "importance-with-a-gradient",
            "missing stop_gradient: the weights of tokens are learnt",
            "return jax.lax.stop_gradient(jnp.clip(log_w_BT, -LOG_LIMIT, LOG_LIMIT))",
            "return jnp.clip(log_w_BT, -LOG_LIMIT, LOG_LIMIT)",
            "test_sampled_losses.py::test_no_gradient_flows_through_importance[token]",
        ),
        (
            "row-importance-with-a-gradient",
            "missing stop_gradient: the weights of rows are learnt",
            "return jax.lax.stop_gradient(jnp.clip(log_w_B1, -LOG_LIMIT, LOG_LIMIT))",
            "return jnp.clip(log_w_B1, -LOG_LIMIT, LOG_LIMIT)",
            "test_sampled_losses.py::test_no_gradient_flows_through_importance[sequence]",
        ),
        (
            "token-rejection-one-sided",
            "tokens that the student hardly writes are kept",
            "jnp.abs(_log_ratio(student_BT, sampler_BT, mask_BT))",
            "(_log_ratio(student_BT, sampler_BT, mask_BT))",
            "test_sampled_losses.py::test_rejections_by_hand",
        ),
        (
            "row-rejection-in-nats",
            "the cap is a ratio and is held against its logarithm",
            "jnp.abs(log_w_B1) <= jnp.log(cap)",
            "jnp.abs(log_w_B1) <= cap",
            "test_sampled_losses.py::test_rejections_by_hand",
        ),
        (
            "veto-by-all",
            "any for all: a row goes only where every token is spoilt",
            "(log_w_BT >= floor).all(1, keepdims=True)",
            "(log_w_BT >= floor).any(1, keepdims=True)",
            "test_sampled_losses.py::test_rejections_by_hand",
        ),
        (
            "veto-mask-forgotten",
            "a row is vetoed by what is not a token",
            "log_w_BT = jnp.where(mask_BT, student_BT - sampler_BT, 0.0)\n    return mask_BT &",
            "log_w_BT = student_BT - sampler_BT\n    return mask_BT &",
            "test_objective_tables.py::test_entries_over_rows_are_zero_off_the_mask"
            "_and_read_nothing_there[veto]",
        ),
        (
            "sampler-kl-sign",
            "-KL(sampler || student)",
            "Mean.of(-log_w_BT, mask_BT)",
            "Mean.of(log_w_BT, mask_BT)",
            "test_sampled_losses.py::test_statistics_are_numpys",
        ),
        (
            "effective-share-of-positions",
            "positions are counted, not tokens",
            "n_tokens = mask_BT.sum().astype(jnp.float32)",
            "n_tokens = jnp.float32(mask_BT.size)",
            "test_sampled_losses.py::test_statistics_are_numpys",
        ),
    ),
    *_of(
        "objectives/losses.py",
        (
            "policy-gradient-sign",
            "the update descends the advantage",
            "return -advantage_x * logp_x",
            "return advantage_x * logp_x",
            "test_loss_tables.py::test_policy_losses_ascend_the_advantage_at_the_policy_that_sampled",
        ),
        (
            "ppo-takes-the-smaller-loss",
            "min for max: the bound is taken where it flatters",
            "loss_x = jnp.maximum(",
            "loss_x = jnp.minimum(",
            "test_sampled_losses.py::test_ppo_stops_where_the_ratio_has_moved_far_enough",
        ),
        (
            "ppo-ratio-inverted",
            "S_old / S for S / S_old",
            "jnp.clip(logp_x - student_x, -LOG_LIMIT, LOG_LIMIT)",
            "jnp.clip(student_x - logp_x, -LOG_LIMIT, LOG_LIMIT)",
            "test_sampled_losses.py::test_ppo_stops_where_the_ratio_has_moved_far_enough",
        ),
        (
            "ppo-dual-everywhere",
            "the dual clip is not confined to A < 0",
            "jnp.where(advantage_x < 0, jnp.minimum(loss_x, -dual * advantage_x), loss_x)",
            "jnp.minimum(loss_x, -dual * advantage_x)",
            "test_sampled_losses.py::test_ppo_stops_where_the_ratio_has_moved_far_enough",
        ),
        (
            "ppo-bounds-swapped",
            "low above and high below",
            "1 - low, 1 + high)\n    loss_x",
            "1 - high, 1 + low)\n    loss_x",
            "test_sampled_losses.py::test_ppo_stops_where_the_ratio_has_moved_far_enough",
        ),
        (
            "k2-doubled",
            "the half is forgotten",
            "_log_ratio(logp_x, target_x) ** 2 / 2",
            "_log_ratio(logp_x, target_x) ** 2",
            "test_sampled_losses.py::test_k_estimators_are_numpys",
        ),
        (
            "k3-inverted",
            "S / T for T / S",
            "log_u_x = -_log_ratio(logp_x, target_x)",
            "log_u_x = _log_ratio(logp_x, target_x)",
            "test_sampled_losses.py::test_k_estimators_are_numpys",
        ),
        (
            "k-estimators-clipped-outright",
            "tokens that are furthest off have no gradient",
            "return value_x + (logp_x - stopped_x)",
            "return jnp.clip(logp_x - jax.lax.stop_gradient(target_x), -LOG_LIMIT, LOG_LIMIT)",
            "test_sampled_losses.py::test_k2_and_k3_are_policy_gradients_token_by_token_with_log_u"
            "_clipped",
        ),
        (
            "k-estimators-move-the-target",
            "missing stop_gradient: the target is drawn to the student",
            "stopped_x - jax.lax.stop_gradient(target_x), -LOG_LIMIT",
            "stopped_x - target_x, -LOG_LIMIT",
            "test_sampled_losses.py::test_no_gradient_reaches_the_target_of_a_k_estimator",
        ),
    ),
    *_of(
        "objectives/reductions.py",
        (
            "token-mean-by-row",
            "a row's number of tokens for the batch's",
            "jnp.maximum(mask_BT.sum(), 1)",
            "jnp.maximum(mask_BT.sum(1, keepdims=True), 1)",
            "test_objective_tables.py::test_reductions_weigh_tokens_as_they_say",
        ),
        (
            "sequence-mean-counts-empty-rows",
            "rows without tokens count",
            "jnp.maximum((n_tokens_B1 > 0).sum(), 1)",
            "n_tokens_B1.size",
            "test_objective_tables.py::test_reductions_weigh_tokens_as_they_say",
        ),
        (
            "sequence-sum-over-positions",
            "the width of the batch for its number of rows",
            "mask_BT.shape[0] * length",
            "mask_BT.shape[1] * length",
            "test_objective_tables.py::test_reductions_weigh_tokens_as_they_say",
        ),
    ),
    *_of(
        "objectives/regularizers.py",
        (
            "entropy-bonus-sign",
            "entropy is taken away",
            "return weight * term_xV.sum(-1)",
            "return -weight * term_xV.sum(-1)",
            "test_sampled_losses.py::test_the_entropy_bonus_is_weight_times_the_entropy"
            "_of_the_real_ids",
        ),
        (
            "anchor-weight-forgotten",
            "the anchor counts in full",
            "return weight * k2(logp_x, ref_x)",
            "return k2(logp_x, ref_x)",
            "test_sampled_losses.py::test_the_anchor_has_the_gradient_of_the_kl_to_the_reference",
        ),
    ),
    *_of(
        "objectives/routing.py",
        (
            "sampled-token-is-a-candidate",
            "a suppressed token gets its own probability back",
            "real_xV & ~sampled_xV & (",
            "real_xV & (",
            "test_routing.py::test_the_sampled_token_is_no_candidate",
        ),
        (
            "candidates-sign",
            "candidates are what the student likes better",
            "(log_t_xV - log_s_xV > margin)",
            "(log_s_xV - log_t_xV > margin)",
            "test_routing.py::test_candidates_are_supported_reachable_and_better_by_the_margin",
        ),
        (
            "reachable-by-the-target",
            "target for student in the floor of what the student can reach",
            '(student_k, "student_k", student_floor, log_s_xV)',
            '(student_k, "student_k", student_floor, log_t_xV)',
            "test_routing.py::test_candidates_are_supported_reachable_and_better_by_the_margin",
        ),
        (
            "route-temperature-sign",
            "S^(1 / temperature) multiplies where it divides",
            "(student_power - 1 / temperature)",
            "(student_power + 1 / temperature)",
            "test_routing.py::test_the_route_is_numpys",
        ),
        (
            "route-not-normalised",
            "rho does not sum to 1",
            "score_xV - jnp.where(open_xV, log_mass(score_xV, open_xV)[..., None], 0.0)",
            "score_xV",
            "test_routing.py::test_the_route_is_numpys",
        ),
        (
            "route-threshold-sign",
            "A < threshold for A < -threshold",
            "gate_x = (advantage_x < -threshold)",
            "gate_x = (advantage_x < threshold)",
            "test_routing.py::test_the_gate_opens_as_asked_and_shut_it_routes_nothing",
        ),
        (
            "route-mass-of-the-target",
            "target for student in the gate's mass",
            "jnp.exp(log_mass(student_xV, candidate_xV)) >= student_mass",
            "jnp.exp(log_mass(target_xV, candidate_xV)) >= student_mass",
            "test_routing.py::test_the_gate_opens_as_asked_and_shut_it_routes_nothing",
        ),
        (
            "route-with-a-gradient",
            "missing stop_gradient: rho is learnt",
            "student_xV, target_xV = map(jax.lax.stop_gradient, (student_xV, target_xV))\n"
            "    candidate_xV",
            "candidate_xV",
            "test_routing.py::test_the_logit_direction_moves_the_samples_probability_to_the_route",
        ),
        (
            "routed-sign",
            "routing takes probability from the candidates",
            "routed_x = -size_x *",
            "routed_x = size_x *",
            "test_routing.py::test_the_loss_is_the_difference_of_two_log_probs",
        ),
        (
            "negatives-with-a-gradient",
            "missing stop_gradient: the advantage is learnt",
            "    advantage_x = jax.lax.stop_gradient(advantage_x)\n    size_x",
            "    size_x",
            "test_routing.py::test_no_gradient_flows_through_the_advantage_or_the_target",
        ),
        (
            "fallback-unclipped",
            "the clip bounds routed negatives alone",
            "fallback * size_x * logp_x",
            "fallback * jnp.abs(advantage_x) * logp_x",
            "test_routing.py::test_the_clip_bounds_negatives_routed_or_not",
        ),
        (
            "switch-at-zero",
            ">= for >: tokens without an advantage learn nothing",
            "return jnp.where(advantage_x > 0, -advantage_x * logp_x, whole_x)",
            "return jnp.where(advantage_x >= 0, -advantage_x * logp_x, whole_x)",
            "test_routing.py::test_the_switch_is_the_policy_gradient_above_zero_and_the_divergence"
            "_elsewhere",
        ),
    ),
    *_of(
        "objectives/supports.py",
        (
            "top-k-of-the-other",
            "the student's likeliest ids for the target's",
            '{"teacher": (target_xV,), "student": (student_xV,)}',
            '{"teacher": (student_xV,), "student": (target_xV,)}',
            "test_supports.py::test_top_k_is_numpys[3]",
        ),
        (
            "union-counts-twice",
            "ids that both have count twice",
            "new_xS = other_valid_xS & ~jnp.take_along_axis(listed_xV, other_xS, -1)",
            "new_xS = other_valid_xS",
            "test_supports.py::test_top_k_is_numpys[3]",
        ),
        (
            "intersection-of-one",
            "ids of the student alone for those that both have",
            "return ids_xS, valid_xS & jnp.take_along_axis(in_other_xV, ids_xS, -1)",
            "return ids_xS, valid_xS",
            "test_supports.py::test_top_k_is_numpys[3]",
        ),
        (
            "rest-bucket-lost",
            "what is outside of the support is not trained",
            "jnp.concatenate([valid_xS, some_x[..., None]], -1)",
            "jnp.concatenate([valid_xS, jnp.zeros_like(some_x)[..., None]], -1)",
            "test_supports.py::test_masses_are_numpys[2-teacher]",
        ),
        (
            "renormalisation-lost",
            "the probabilities as they are for those given the support",
            "logp_xS - jnp.where(valid_xS, inside_x1, 0.0)",
            "logp_xS",
            "test_supports.py::test_masses_are_numpys[2-teacher]",
        ),
        (
            "rest-of-unreal-ids",
            "ids that do not exist have mass outside",
            "outside_xV = real_xV & ~members(",
            "outside_xV = ~members(",
            "test_supports.py::test_masses_are_numpys[2-teacher]",
        ),
        (
            "likeliest-of-unreal-ids",
            "ids that do not exist are chosen",
            "jnp.where(real_xV, jnp.maximum(logp_xV, lowest), -jnp.inf)",
            "jnp.maximum(logp_xV, lowest)",
            "test_supports.py::test_ids_that_do_not_exist_are_never_valid",
        ),
        (
            "members-of-invalid-entries",
            "entries that are not valid are members",
            "a.at[i].max(v)",
            "a.at[i].set(True)",
            "test_supports.py::test_only_valid_entries_are_members",
        ),
        (
            "complement-sign",
            "log(1 + p) for log(1 - p)",
            "jnp.log1p(-jnp.exp(",
            "jnp.log1p(jnp.exp(",
            "test_supports.py::test_the_rest_of_a_known_support_is_what_is_missing",
        ),
    ),
    *_of(
        "objectives/targets.py",
        (
            "lambda-off-by-one",
            "lambda for lambda - 1: T^(1 + lambda) R^-lambda",
            "return teacher + (lam - 1) * ratio",
            "return teacher + lam * ratio",
            "test_gopd.py::test_the_token_reward_of_g_opd_is_the_papers",
        ),
        (
            "lambda-forgotten",
            "the target is the teacher at every lambda",
            "return teacher + (lam - 1) * ratio",
            "return teacher + 0 * ratio",
            "test_gopd.py::test_the_token_reward_of_g_opd_is_the_papers",
        ),
        (
            "teacher-for-reference",
            "R / T for T / R: lambda above 1 draws back to the reference",
            "ratio = teacher - ref",
            "ratio = ref - teacher",
            "test_gopd.py::test_the_token_reward_of_g_opd_is_the_papers",
        ),
        (
            "ratio-cap-one-sided",
            "log T - log R is capped from above alone",
            "ratio = jnp.clip(ratio, -cap, cap)",
            "ratio = jnp.minimum(ratio, cap)",
            "test_targets.py::test_the_cap_bounds_the_log_ratio_on_both_sides",
        ),
        (
            "tilt-not-normalised",
            "the tilted teacher is no distribution",
            "return jax.nn.log_softmax(jnp.where(real_xV, tilted_xV, -jnp.inf))",
            "return jnp.where(real_xV, tilted_xV, -jnp.inf)",
            "test_targets.py::test_the_tilted_teacher_is_a_distribution_over_the_real_ids",
        ),
        (
            "mixture-of-logs",
            "the mixture of logs for the log of the mixture, and the other way round",
            'if space == "log":',
            'if space != "log":',
            "test_targets.py::test_teachers_are_mixed_in_the_space_that_is_named",
        ),
        (
            "mixture-mean-for-sum",
            "weights are divided by the number of teachers besides",
            "jnp.where(weights > 0, weights * logps, 0.0).sum(0)",
            "jnp.where(weights > 0, weights * logps, 0.0).mean(0)",
            "test_targets.py::test_teachers_are_mixed_in_the_space_that_is_named",
        ),
        (
            "schedule-without-an-end",
            "clamp missing: lambda grows past its last value",
            "return jnp.minimum(step / steps, 1.0)",
            "return step / steps",
            "test_targets.py::test_schedules_go_from_their_start_to_lambda_and_stay",
        ),
        (
            "cosine-upside-down",
            "it begins where it is to end",
            "0.5 * (1 - jnp.cos(",
            "0.5 * (1 + jnp.cos(",
            "test_targets.py::test_schedules_go_from_their_start_to_lambda_and_stay",
        ),
    ),
    *_of(
        "objectives/objective.py",
        (
            "correction-before-credit",
            "the correction is summed and discounted with the rewards",
            "advantage_BT += f_divergences.correction(self.divergence, log_u_BT)",
            'q["token_reward_BT"] += f_divergences.correction(self.divergence, log_u_BT)\n'
            "                advantage_BT = fed(self.credit, q)",
            "test_step_credit.py::test_the_correction_of_a_divergence_stays_with_its_own_token",
        ),
        (
            "correction-lost",
            "the stop-gradient estimate under the corrected one's name",
            "advantage_BT += f_divergences.correction(self.divergence, log_u_BT)",
            "advantage_BT = q['credit_BT']",
            "test_step_credit.py::test_the_correction_of_a_divergence_stays_with_its_own_token",
        ),
        (
            "correction-unclipped",
            "the clip of log u does not reach the correction",
            'self.clipped(jnp.where(mask_BT, q["log_u_BT"], 0.0))',
            'jnp.where(mask_BT, q["log_u_BT"], 0.0)',
            "test_step_credit.py::test_the_correction_of_a_divergence_stays_with_its_own_token",
        ),
        (
            "baseline-added",
            "sign of the baseline",
            "advantage_BT = advantage_BT - fed(self.baseline, q)",
            "advantage_BT = advantage_BT + fed(self.baseline, q)",
            "test_step_credit.py::test_credit_and_baselines_are_those_of_the_sums_written_out"
            "[immediate less the state's own mean]",
        ),
        (
            "distil-weight-on-the-task",
            "the weight is of the verifier's reward",
            "fed(self.task, q) + self.distil_weight * advantage_BT",
            "self.distil_weight * fed(self.task, q) + advantage_BT",
            "test_step_credit.py::test_the_verifiers_reward_and_the_distillation_are_added",
        ),
        (
            "advantage-clip-one-sided",
            "advantages are clipped from above alone",
            "jnp.clip(advantage_BT, -self.advantage_clip, self.advantage_clip)",
            "jnp.minimum(advantage_BT, self.advantage_clip)",
            "test_step_credit.py::test_credit_and_baselines_are_those_of_the_sums_written_out"
            "[discounted less the group's others, clipped]",
        ),
        (
            "gates-added",
            "weights are added, not multiplied",
            "math.prod(found)",
            "sum(found)",
            "test_step_credit.py::test_gates_multiply_the_loss_and_leave_the_number_of_tokens",
        ),
        (
            "lambda-of-the-row-forgotten",
            "all rows have the run's lambda",
            "self.lam if lam_B is None else lam_B",
            "self.lam if lam_B is None else self.lam + 0 * lam_B",
            "test_step_targets.py::test_rows_have_a_lambda_of_their_own[policy_gradient]",
        ),
        (
            "ratio-not-normalised",
            "f of a ratio of which one side is no distribution",
            'linear = self.divergence is DIVERGENCES["reverse_kl"] and self.log_u_clip is None',
            "linear = self.log_u_clip is None",
            "test_step_vocabulary.py::test_a_step_is_the_descent_from_full_logits"
            "[sampled forward KL]",
        ),
    ),
    *_of(
        "objectives/inspection.py",
        (
            "inspected-kl-weighed-by-the-other",
            "Q for P as the measure",
            "jnp.exp(logp_xV) * (logp_xV - logq_xV)",
            "jnp.exp(logq_xV) * (logp_xV - logq_xV)",
            "test_inspection.py::test_divergences_and_entropies_are_numpys",
        ),
        (
            "overlap-mass-of-the-target",
            "target for student",
            "jnp.exp(log_mass(student_xV, shared_xV))",
            "jnp.exp(log_mass(target_xV, shared_xV))",
            "test_inspection.py::test_overlap_and_tail_are_numpys[4]",
        ),
        (
            "tail-of-the-student",
            "outside of the student's likeliest for outside of the target's",
            "real_xV & ~_top(target_xV, real_xV, k)[0]",
            "real_xV & ~_top(student_xV, real_xV, k)[0]",
            "test_inspection.py::test_overlap_and_tail_are_numpys[4]",
        ),
        (
            "cosine-of-squares",
            "the root is forgotten",
            "jnp.sqrt(_dot(a, a) * _dot(b, b))",
            "(_dot(a, a) * _dot(b, b))",
            "test_inspection.py::test_cosine_is_numpys_over_all_leaves",
        ),
        (
            "repetition-of-padding",
            "windows that are no n-grams repeat each other",
            "(same_BW & (sorted_keys[0][:, 1:] == 0)).sum(1)",
            "same_BW.sum(1)",
            "test_inspection.py::test_repetition_is_the_share_of_ngrams_seen_before[2]",
        ),
        (
            "auroc-ties-lost",
            "ties count nothing",
            'for side in ("left", "right")',
            'for side in ("left", "left")',
            "test_inspection.py::test_auroc_counts_the_pairs_in_order_and_half_of_the_ties[ties]",
        ),
    ),
    *_of(
        "objectives/diagnostics.py",
        (
            "reported-kl-sign",
            "-KL(S || T) is reported",
            'gap_BT = q["student_BT"] - teacher_BT',
            'gap_BT = teacher_BT - q["student_BT"]',
            "test_step_targets.py::test_a_mixture_of_sampled_tokens_is_that_of_their_probabilities",
        ),
        (
            "nothing-is-at-its-cap",
            "> for >=: no weight is above what bounds it",
            'fed(objective.importance, q) >= options["cap"].default',
            'fed(objective.importance, q) > options["cap"].default',
            "test_step_off_policy.py::test_importance_and_rejection_weigh_the_tokens"
            "_that_others_wrote",
        ),
        (
            "kept-for-rejected",
            "the share that is left is reported as the share that is not",
            "Mean.of(~keep_BT, mask_BT)",
            "Mean.of(keep_BT, mask_BT)",
            "test_step_off_policy.py::test_importance_and_rejection_weigh_the_tokens"
            "_that_others_wrote",
        ),
    ),
    *_of(
        "update.py",
        (
            "log-ratio-sign",
            "log S - log T for log T - log S",
            'q["log_u_BT"] = q["target_BT"] - q["student_BT"]',
            'q["log_u_BT"] = q["student_BT"] - q["target_BT"]',
            "test_step_credit.py::test_gates_multiply_the_loss_and_leave_the_number_of_tokens",
        ),
        (
            "position-shifted",
            "positions begin at -1",
            "jnp.arange(width) - (n_prompt - 1)",
            "jnp.arange(width) - n_prompt",
            "test_step_credit.py::test_gates_multiply_the_loss_and_leave_the_number_of_tokens",
        ),
        (
            "ids-shifted",
            "shift by one: a token's own state for the token",
            "ids_BT = rollout.tokens_BL[:, 1:]",
            "ids_BT = rollout.tokens_BL[:, :-1]",
            "test_step_credit.py::test_gates_multiply_the_loss_and_leave_the_number_of_tokens",
        ),
        (
            "weights-forgotten",
            "gates, importance and rejection do not reach the loss",
            'loss_BT = loss_BT * seen["weight_BT"]',
            "loss_BT = loss_BT * 1.0",
            "test_step_off_policy.py::test_importance_and_rejection_weigh_the_tokens"
            "_that_others_wrote",
        ),
        (
            "microbatches-averaged",
            "gradients are divided by the number of microbatches, which the weights have done",
            "return losses, grads, back(batching.join(seen, n))",
            "grads = jax.tree.map(lambda g: g / n, grads)\n"
            "        return losses, grads, back(batching.join(seen, n))",
            "test_step_credit.py::test_gates_multiply_the_loss_and_leave_the_number_of_tokens",
        ),
        (
            "updates-share-forgotten",
            "each of n updates has one n-th of its weight",
            "rows.replace(reduction_BT=rows.reduction_BT * n)",
            "rows.replace(reduction_BT=rows.reduction_BT)",
            "test_step_off_policy.py::test_updates_and_epochs_learn_from_advantages_fixed_at_the"
            "_start",
        ),
        (
            "closed-form-sign",
            "KL(S || T) for its negative in V",
            'value_BT - found["local_kl_BT"], after_B - found["after_kl_B"]',
            'value_BT + found["local_kl_BT"], after_B + found["after_kl_B"]',
            "test_step_credit.py::test_before_it_learns_the_value_is_the_exact_expected_reward"
            "_of_the_state",
        ),
        (
            "value-learns-the-advantage",
            "A for A + V as the return",
            'known["credit_BT"] + (known["value_BT"] if beyond else 0.0)',
            'known["credit_BT"]',
            "test_step_credit.py::test_before_it_learns_the_value_is_the_exact_expected_reward"
            "_of_the_state",
        ),
        (
            "warmup-one-more",
            "> for >=: the student waits a step longer",
            "state.step >= recipe.critic.warmup_steps",
            "state.step > recipe.critic.warmup_steps",
            "test_step_credit.py::test_while_the_critic_warms_up_the_student_stays_as_it_was",
        ),
        (
            "group-relative-forgotten",
            "rewards are not compared within their group",
            "group_relative(scores.reward_B, rollout.group_B)",
            "scores.reward_B + 0 * group_relative(scores.reward_B, rollout.group_B)",
            "test_step_credit.py::test_the_verifiers_reward_and_the_distillation_are_added",
        ),
        (
            "average-inverted",
            "the moving average forgets at the rate at which it is to keep",
            "decay * m + (1 - decay) * p",
            "(1 - decay) * m + decay * p",
            "test_step_roles.py::test_a_teacher_that_follows_is_the_moving_average_of_the_student",
        ),
    ),
    *_of(
        "heads.py",
        (
            "teachers-ids-on-every-device",
            "each device holds the logits of all ids for rows of several teachers",
            'constrain(found, "batch", None, "vocab")',
            "sharding.constrain_rows(found)",
            "test_step_vocabulary.py::test_no_device_holds_the_logits_of_another_ones_ids",
        ),
        (
            "step-ratio-not-normalised",
            "log u is that of the sampled tokens' log-probs where f needs distributions",
            'found["target"], mixed_xV = pick(target_xV, ids_x), teacher_xV',
            'found["target"] = tilted(found["teacher"], found.get("ref"), lam=lam_x)',
            "test_step_vocabulary.py::test_a_step_is_the_descent_from_full_logits"
            "[sampled forward KL]",
        ),
        (
            "local-kl-upside-down",
            "the expected reward for its negative",
            "return -jnp.where(valid_xS, jnp.exp(student_xS) * reward_xS, 0.0).sum(-1)",
            "return jnp.where(valid_xS, jnp.exp(student_xS) * reward_xS, 0.0).sum(-1)",
            "test_step_credit.py::test_credit_and_baselines_are_those_of_the_sums_written_out"
            "[immediate less the state's own mean]",
        ),
        (
            "local-kl-of-the-teacher",
            "lambda forgotten in the state's expected reward",
            "target_xV = tilted(teacher_xV, ref_xV, lam=lam, cap=objective.ratio_cap)\n        if",
            "target_xV = teacher_xV\n        if",
            "test_step_credit.py::test_credit_and_baselines_are_those_of_the_sums_written_out"
            "[immediate less the state's own mean]",
        ),
        (
            "geometric-mixture-not-normalised",
            "a geometric mean of teachers taken for a distribution",
            'recipe.mixture is not None and recipe.mixture.space == "log"',
            'recipe.mixture is not None and recipe.mixture.space == "logs"',
            "test_step_targets.py::test_a_geometric_mixture_is_normalised_where_a_ratio_is_asked_for",
        ),
        (
            "given-shifted",
            "shift by one: advantages of the tokens before",
            "x_BC = x_BT[:, first:end]",
            "x_BC = jnp.pad(x_BT, ((0, 0), (1, 0)))[:, first:end]",
            "test_step_vocabulary.py::test_a_step_is_the_descent_from_full_logits[cr_opd]",
        ),
    ),
    *_of(
        "critic.py",
        (
            "value-moves-the-student",
            "missing stop_gradient: the value's loss trains the student",
            "hidden_xD = jax.lax.stop_gradient(hidden_xD).astype(jnp.float32)",
            "hidden_xD = hidden_xD.astype(jnp.float32)",
            "test_step_credit.py::test_no_gradient_of_the_value_reaches_the_hidden_state",
        ),
        (
            "clipped-value-rewarded",
            "min for max: a clipped value is rewarded for having moved",
            "jnp.maximum(plain_BT, 0.5 *",
            "jnp.minimum(plain_BT, 0.5 *",
            "test_step_credit.py::test_a_clipped_value_is_charged_for_having_moved",
        ),
        (
            "explained-by-the-value-alone",
            "Var(V) for Var(G - V)",
            "1 - variance(return_BT - value_BT)",
            "1 - variance(value_BT)",
            "test_step_credit.py::test_explained_variance_is_one_less_what_is_left",
        ),
    ),
    *_of(
        "scoring.py",
        (
            "scoring-temperature-forgotten",
            "the student is scored at temperature 1",
            "lm.logits(decoder, params, hidden_xD) / temperature",
            "lm.logits(decoder, params, hidden_xD)",
            "test_scoring.py::test_temperature_and_vocabulary_are_those_asked_for",
        ),
        (
            "scoring-shifted",
            "shift by one: the state behind a token predicts it",
            "return hidden_BLD[:, first:-1], ids_BC",
            "return hidden_BLD[:, first + 1 :], ids_BC",
            "test_scoring.py::test_any_chunk_gives_the_log_probs_of_all_logits",
        ),
        (
            "scoring-one-id-more",
            "<= for <: an id that no token has takes mass",
            "jnp.arange(logits_xV.shape[-1]) < n_vocab",
            "jnp.arange(logits_xV.shape[-1]) <= n_vocab",
            "test_scoring.py::test_any_chunk_gives_the_log_probs_of_all_logits",
        ),
        (
            "scoring-mask-forgotten",
            "positions without a token have log-probs",
            "return jnp.where(mask_BT, logp_BT, 0.0), jnp.where(",
            "return logp_BT, jnp.where(",
            "test_scoring.py::test_any_chunk_gives_the_log_probs_of_all_logits",
        ),
    ),
    *_of(
        "batching.py",
        (
            "layers-come-in-whole",
            "of a model by layer the whole stacks come to the device",
            "rows = table(decoder.cfg) if decoder.by_layer else ()",
            "rows = ()",
            "test_by_layer.py"
            "::test_no_stack_of_matrices_comes_in_whole_and_each_layer_once_a_microbatch",
        ),
        (
            "gathered-on-the-hosts",
            "what comes in from host memory does not keep its shards",
            "on_device(x, *rows[name].axes)",
            "on_device(x)",
            "test_by_layer.py::test_what_comes_in_keeps_its_shards",
        ),
        (
            "rows-joined-in-another-order",
            "pieces are put one after the other where they were strided",
            "x.swapaxes(0, 1).reshape(x.shape[1] * n, *x.shape[2:])",
            "x.reshape(x.shape[1] * n, *x.shape[2:])",
            "test_step_credit.py::test_credit_and_baselines_are_those_of_the_sums_written_out"
            "[return_to_go less the batch's mean]",
        ),
        (
            "rows-of-another-teacher",
            "the permutation for its inverse",
            "back = np.argsort(np.concatenate(order))",
            "back = np.concatenate(order)",
            "test_step_roles.py::test_tasks_are_routed_to_teachers",
        ),
        (
            "results-in-the-order-of-lengths",
            "what was found for rows sorted by length is not brought back into their order",
            "lambda tree: take(tree, jnp.argsort(order_Gm, axis=1))",
            "lambda tree: take(tree, order_Gm)",
            "test_buckets.py::test_pieces_are_sorted_by_length_and_results_come_back_in_order",
        ),
        (
            "a-width-too-narrow",
            "rows one token longer than a width are cut to it",
            "(jnp.array(sizes[:-1], jnp.int32) < longest).sum()",
            "(jnp.array(sizes[:-1], jnp.int32) < longest - 1).sum()",
            "test_buckets.py::test_the_narrowest_width_that_holds_the_rows_is_computed",
        ),
    ),
    *_of(
        "sampler.py",
        (
            "mask-after-the-end",
            "what follows the end token is trained",
            "done_B=jnp.where(active_B, stops_B | over_B, state.done_B)",
            "done_B=jnp.where(active_B, over_B, state.done_B)",
            "test_sampler.py::test_masks_end_with_the_end_token_or_at_the_length",
        ),
        (
            "a-place-taken-with-its-mask",
            "a prompt takes a slot with the tokens of the row before it in the mask",
            "mask_BC=fresh(False, state.mask_BC)",
            "mask_BC=state.mask_BC",
            "test_slots.py::test_slots_change_no_completion[qwen3-3]",
        ),
        (
            "positions-of-the-row-before",
            "a row that takes a slot counts its tokens from where the one before it began",
            "began_B=fresh(state.step, state.began_B)",
            "began_B=state.began_B",
            "test_slots.py::test_slots_change_no_completion[qwen3-3]",
        ),
    ),
    *_of(
        "drawing.py",
        (
            "sampling-temperature-forgotten",
            "tokens are drawn at temperature 1",
            "logits_BV = logits_BV / temperature",
            "logits_BV = logits_BV * 1.0",
            "test_sampler.py::test_log_probs_are_the_scorers",
        ),
        (
            "one-draw-for-every-position",
            "the position is left out of the key",
            "jax.vmap(jax.random.fold_in)(keys_B, t_B)",
            "jax.vmap(jax.random.fold_in)(keys_B, 0 * t_B)",
            "test_sampler.py::test_whole_completions_have_their_exact_probabilities",
        ),
        (
            "block-and-id-by-one-number",
            "the id in a block is drawn with the number that chose the block",
            "_inverse(p_BW, uniform_B2[:, 1])",
            "_inverse(p_BW, uniform_B2[:, 0])",
            "test_slots.py::test_a_draw_inverts_the_cumulative_distribution",
        ),
        (
            "padding-ids-drawn",
            "<= for <: an id that no token has can be drawn",
            "jnp.arange(logits_BV.shape[-1]) < n_vocab",
            "jnp.arange(logits_BV.shape[-1]) <= n_vocab",
            "test_sampler.py::test_log_probs_are_the_scorers",
        ),
        (
            "nucleus-without-the-one-that-crosses",
            "ids whose sum reaches top_p, less the last",
            "kept_xV = (before_xV < top_p)",
            "kept_xV = (before_xV + sorted_xV < top_p)",
            "test_generate.py::test_the_nucleus_is_the_fewest_likeliest_ids",
        ),
    ),
    *_of(
        "models/cache.py",
        (
            "prompt-beside-its-place",
            "a prompt is put one slot too late, where the row's next token goes",
            "first = cache.index - n_prompt\n",
            "first = cache.index - n_prompt + 1\n",
            "test_slots.py::test_slots_change_no_completion[qwen3-3]",
        ),
        (
            "seen-by-the-next-row",
            "a new prompt sees the keys of the row that it follows",
            "valid_BP[:, of_L] & within_L, cache.valid_BL)",
            "(valid_BP[:, of_L] & within_L) | cache.valid_BL, cache.valid_BL)",
            "test_slots.py::test_slots_change_no_completion[qwen3-3]",
        ),
        (
            "newest-slot-unread",
            "a width is read that leaves out the newest slot",
            "jnp.int32) < cache.index).sum()",
            "jnp.int32) < cache.index - 1).sum()",
            "test_narrow_sampling.py::test_reading_takes_the_least_width_that_holds_what_is_there",
        ),
    ),
    *_of(
        "models/decoder.py",
        (
            "first-token-of-the-longest-prompt-cut",
            "prompts are cut to a width one short of the longest",
            "jnp.int32) < longest).sum()",
            "jnp.int32) < longest - 1).sum()",
            "test_narrow_sampling.py::test_prompts_are_cut_to_the_width_of_the_longest",
        ),
        (
            "coming-prompts-forgotten",
            "prompts are cut to the longest of the first rows, whatever will take their slots",
            "jnp.argmax(all_RP.any(0))",
            "jnp.argmax(valid_BP.any(0))",
            "test_narrow_sampling.py::test_longer_prompts_than_the_first_ones_pass_through_the_slots",
        ),
    ),
    *_of(
        "models/ops.py",
        (
            "value-scale-forgotten",
            "8-bit values are summed without their scales",
            "weight_BKxS = weight_BKxS * scale_BKS1.swapaxes(2, 3)",
            "weight_BKxS = weight_BKxS * 1.0",
            "test_narrow_sampling.py::test_attention_to_a_rounded_past_is_that_to_its_numbers",
        ),
    ),
    *_of(
        "models/quantized.py",
        (
            "numbers-cut-off",
            "int8 is cut off where it should be rounded",
            '(jnp.round(x) if dtype == "int8" else x)',
            "x",
            "test_narrow_sampling.py::test_a_number_is_the_nearest_of_its_run",
        ),
    ),
    *_of(
        "models/attention.py",
        (
            "heads-of-the-first-device",
            "a device that has some heads reads the keys and values of the first device's",
            "first = jax.lax.axis_index(axis) * n_own",
            "first = jax.lax.axis_index(axis)",
            "test_sequence.py::test_a_devices_heads_may_read_parts_of_two_groups",
        ),
    ),
    *_of(
        "sharding.py",
        (
            "rows-to-decode-unchecked",
            "rows are held against the devices of training, not against those that decode",
            "if n_rows % n_decode_shards(mesh):",
            "if n_rows % n_row_shards(mesh):",
            "test_sequence.py::test_rows_and_heads_that_do_not_divide_are_refused",
        ),
    ),
    *_of(
        "models/moe.py",
        (
            "experts-counted-along-one-axis",
            "which experts a device has is read off the last of their axes alone",
            "jax.lax.axis_index(expert_axes) * n_own",
            "jax.lax.axis_index(expert_axes[-1:]) * n_own",
            "test_moe.py::test_a_bound_on_tokens_at_one_time_changes_nothing[(1, 2, 2, 2)]",
        ),
        (
            "gradient-of-own-experts-alone",
            "a token's gradient misses what the other devices' experts add to it",
            "= _differing(tokens_nD, alike), _differing(chance_nA, alike)",
            "= tokens_nD, _differing(chance_nA, alike)",
            "test_moe.py::test_a_bound_on_tokens_at_one_time_changes_nothing[(1, 2, 2, 2)]",
        ),
        (
            "experts-gradient-added-in-each-chunk",
            "the gradient of the experts goes over the network once a chunk",
            "experts = [_differing(x, others).astype(jnp.float32) for x in experts]",
            "experts = [x.astype(jnp.float32) for x in experts]",
            "test_moe.py::test_gradients_are_added_over_rows_once_and_not_in_each_chunk",
        ),
    ),
    *_of(
        "step.py",
        (
            "evaluated-in-8-bits",
            "evaluation reads the cache that only what is corrected may have",
            "cache_dtype=recipe.cache_dtype if narrow else None",
            "cache_dtype=recipe.cache_dtype",
            "test_narrow_sampling.py::test_evaluation_samples_with_the_models_own_numbers",
        ),
        (
            "first-teacher-for-all",
            "every row is scored by the first teacher",
            "                decoder = recipe.teachers[i]\n",
            "                decoder, i = recipe.teachers[0], 0\n",
            "test_step.py::test_each_row_is_scored_by_its_own_teacher_and_by_the_reference",
        ),
        (
            "reference-of-the-first-teacher",
            "the reference's log-probs are the first teacher's",
            "params = batching.resident(recipe.reference, frozen.reference, before)",
            "params = batching.resident(recipe.reference, frozen.teachers[0], before)",
            "test_step.py::test_each_row_is_scored_by_its_own_teacher_and_by_the_reference",
        ),
    ),
    *_of(
        "diagnose.py",
        (
            "probe-reduced-otherwise",
            "the exact gradient weighs tokens as the default does",
            'for name in (*of_target, "reduction") if name in options',
            "for name in of_target if name in options",
            "test_diagnose.py"
            "::test_the_target_is_that_of_the_rows_own_lambda_at_the_step_and_the_divergence_the_runs",
        ),
        (
            "quarters-from-the-prompt",
            "a position is counted from the row's beginning",
            "position_BT = jnp.arange(mask_BT.shape[1]) - (rollout.n_prompt - 1)",
            "position_BT = jnp.arange(mask_BT.shape[1])",
            "test_diagnose.py::test_every_figure_of_the_probe_is_that_of_full_logits",
        ),
        (
            "routable-of-all-tokens",
            "the routable share is of all tokens, not of the negatives",
            'jnp.where(mask_BT, seen["routable_BT"], 0.0).sum(), negative_BT.sum())',
            'jnp.where(mask_BT, seen["routable_BT"], 0.0).sum(), mask_BT.sum())',
            "test_diagnose.py::test_every_figure_of_the_probe_is_that_of_full_logits",
        ),
    ),
)
