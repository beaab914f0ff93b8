// The check with which bindings refuse the values of an argument. PyTorch turns every failed check of C++ into a RuntimeError.
// The message therefore begins with "ValueError: ", and internlm2_kernels/_native.py raises what follows as a ValueError.
// Several operators share a binding's checks, so the caller passes the name of its operator for the message.
#pragma once
#include <torch/headeronly/util/Exception.h>

// The message is "OPERATOR: ARGUMENT: expected ..., got ...". The arguments after `argument` are concatenated and follow
// "expected ".
#define INTERNLM2_CHECK_VALUE(condition, op, argument, ...) \
  STD_TORCH_CHECK(condition, "ValueError: ", op, ": ", argument, ": expected ", __VA_ARGS__)
