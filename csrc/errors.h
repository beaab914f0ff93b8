// The errors with which bindings refuse values. PyTorch turns a failed check into a RuntimeError; Python's side raises what
// follows the marker as the ValueError that it is. The caller passes the operator's name: checks are shared, names are not
// guessed.
#pragma once
#include <torch/headeronly/util/Exception.h>

// "OPERATOR: ARGUMENT: expected ..., got ...": the text after "expected" is given in pieces.
#define INTERNLM2_CHECK_VALUE(condition, op, argument, ...) \
  STD_TORCH_CHECK(condition, "ValueError: ", op, ": ", argument, ": expected ", __VA_ARGS__)
