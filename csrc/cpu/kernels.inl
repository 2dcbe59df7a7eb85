/* The kernels for one dtype; template.h says what must be defined. */
#include "tile.inl"

#include "forward.inl"

#include "backward.inl"
