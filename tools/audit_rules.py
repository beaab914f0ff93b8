"""What the static audit demands of the compiled kernels beyond their resources: wide accesses, tensor cores, true reasons.

`python -m tools.audit` applies the rules to what it compiled, and `--check` fails where one is broken.
"""

PRODUCTS = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}  # on Hopper mma.sync adds up in another order, and is slower

# Kernels whose accesses are few numbers each: sums, checks, statistics, int8 caches with their scales, scans backwards.
NARROW = ("cuda/", "dweight_kernel", "cols 128", "cols 1/", "cols 1,", "head of 2/", "heads of 2/", "check_kernel",
          "merge_kernel", "delta_kernel", "int8", "blocks of 1", "odd", "reduce_rows_kernel", "coefficients_kernel",
          "sum_kernel", "prepare_kernel", "peak_kernel", "gae_fwd_kernel", "ppo_value_loss_fwd_kernel")
# Kernels that have, in addition to their wide accesses, a masked path for ends, or that reduce many elements to a number.
MIXED = ("reward_loss", "adamw_step_kernel", "squared_norm", "ppo_", "linear_head_", "cross_entropy_fwd_kernel",
         "cross_entropy_bwd_kernel")
# Those of MIXED that write as much as they read.
WRITING = ("adamw_step", "cross_entropy_bwd", "linear_head_product", "ppo_policy_loss_bwd", "ppo_value_loss_bwd",
           "reward_loss_bwd")
HEADS = ("linear_head_fwd_kernel", "linear_head_gradient_kernel", "linear_head_product_kernel")


def problems(rows: dict[str, dict], allowed_stack: dict[str, str] | None = None) -> list[str]:
    """The broken rules, a line each. `allowed_stack`: reasons of spills, of which none may be left over."""
    found = [line for key, facts in rows.items() for line in (*narrow_accesses(key, facts), *wrong_products(key, facts))]
    for key in allowed_stack or ():
        if not any(facts["stack_bytes"] for name, facts in rows.items() if key in (name, name.rsplit("/sm_", 1)[0])):
            found.append(f"{key} does not spill: take it out of ALLOWED_STACK")
    return found


def has(key: str, parts) -> bool:
    return any(part in key for part in parts)


def narrow_accesses(key: str, facts: dict):
    """A bfloat16 kernel at a size that models have moves most of its bytes 16 at a time; positions and scales are scalars."""
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
    """16-bit products of attention use their architecture's tensor-core instruction and no other; those of heads use it."""
    arch = key.rsplit("/", 1)[1]
    if "/bfloat16/" not in key or key.startswith("cuda/") or arch not in PRODUCTS:
        return
    used = {name for name in PRODUCTS.values() if facts[name] > 0}
    if "attention/" in key and not has(key, ("check_kernel", "merge_kernel", "delta_kernel")):
        if used != {PRODUCTS[arch]}:
            yield f"{key}: its products use {sorted(used)}, expected {PRODUCTS[arch]} alone"
    elif key.split("/")[1] in HEADS and PRODUCTS[arch] not in used:
        yield f"{key}: its products do not use {PRODUCTS[arch]}"
