#pragma once
#include <nanobind/nanobind.h>

void shoal_bind_engine(nanobind::module_& m);
