#pragma once
#include <nanobind/nanobind.h>

void shoal_bind_packed(nanobind::module_& m);
