"""What the static audit demands of the machine code of kernels: wide memory accesses, products on the tensor cores, and that
every exception which `tools/audit.py` allows is still needed. Registers, spills and shared memory are checked there.

`python -m tools.audit` applies the rules to what it compiled, and `--check` fails where one is broken.
"""

PRODUCTS = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}  # on Hopper mma is slower and sums in another order

# Parts of row keys whose kernels need no wide accesses, because each access is of few numbers: sums, checks, statistics, int8
# caches with their scales, scans from the end of a sequence.
NARROW = ("cuda/", "dweight_kernel", "cols 128", "cols 1/", "cols 1,", "head of 2/", "heads of 2/", "check_kernel",
          "merge_kernel", "delta_kernel", "int8", "blocks of 1", "odd", "reduce_rows_kernel", "coefficients_kernel",
          "sum_kernel", "prepare_kernel", "peak_kernel", "gae_fwd_kernel", "ppo_value_loss_fwd_kernel",
          "sample_count_kernel", "sample_bias_kernel")
# Kernels that have narrow accesses besides their wide ones: in a masked path for the ends of rows, or to store reduced numbers.
MIXED = ("linear_bwd_bias_kernel", "reward_loss", "adamw_step_kernel", "squared_norm", "ppo_", "linear_head_",
         "cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel", "sample_fwd_kernel",
         "sample_change_kernel")
# The kernels among MIXED that write about as many bytes as they read, so that their stores must be wide too.
WRITING = ("adamw_step", "cross_entropy_bwd", "linear_head_product", "ppo_policy_loss_bwd", "ppo_value_loss_bwd",
           "reward_loss_bwd", "sample_change_kernel")
HEADS = ("linear_head_fwd_kernel", "linear_head_gradient_kernel", "linear_head_product_kernel")


def problems(rows: dict[str, dict], allowed_stack: dict[str, str] | None = None) -> list[str]:
    """The broken rules, one line each. `allowed_stack` is audit.ALLOWED_STACK: an entry whose kernels do not spill is
    reported too."""
    found = [line for key, facts in rows.items() for line in (*narrow_accesses(key, facts), *wrong_products(key, facts))]
    for key in allowed_stack or ():
        if not any(facts["stack_bytes"] for name, facts in rows.items() if key in (name, name.rsplit("/sm_", 1)[0])):
            found.append(f"{key} does not spill: take it out of ALLOWED_STACK")
    return found


def has(key: str, parts) -> bool:
    return any(part in key for part in parts)


def narrow_accesses(key: str, facts: dict):
    """The rule that a bfloat16 kernel at a model's size moves most of its bytes by 16-byte accesses; yields a line where its
    loads or its stores break it. The rest may be narrow, such as positions and scales."""
    if "/bfloat16/" not in key or has(key, NARROW):
        return
    for access in ("loads", "stores"):
        widths = {int(bits): int(count) for count, bits in (w.split("x") for w in facts[access].split())}
        mixed = has(key, MIXED)
        if not widths or (access == "stores" and mixed and not has(key, WRITING)):
            continue
        share = 128 * widths.get(128, 0) / sum(bits * count for bits, count in widths.items())
        least = 0.7 if not mixed else 0.25 if access == "loads" else 0.4
        if share <= least:
            yield f"{key}: {share:.0%} of the {access} are 16 bytes wide ({facts[access]}), more than {least:.0%} expected"


def wrong_products(key: str, facts: dict):
    """The rule that 16-bit products use the tensor-core instruction of PRODUCTS for their architecture: attention uses no
    other, linear heads use at least that one."""
    arch = key.rsplit("/", 1)[1]
    if "/bfloat16/" not in key or key.startswith("cuda/") or arch not in PRODUCTS:
        return
    used = {name for name in PRODUCTS.values() if facts[name] > 0}
    if "attention/" in key and not has(key, ("check_kernel", "merge_kernel", "delta_kernel")):
        if used != {PRODUCTS[arch]}:
            yield f"{key}: its products use {sorted(used)}, expected {PRODUCTS[arch]} alone"
    elif key.split("/")[1] in HEADS and PRODUCTS[arch] not in used:
        yield f"{key}: its products do not use {PRODUCTS[arch]}"
