// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
#include "backend.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static const struct {
	const char *name;
	uint32_t size;
} dtypes[] = {
	[KVSCRATCH_DTYPE_F64] = { "f64", 8 },
	[KVSCRATCH_DTYPE_F32] = { "f32", 4 },
	[KVSCRATCH_DTYPE_F16] = { "f16", 2 },
	[KVSCRATCH_DTYPE_BF16] = { "bf16", 2 },
	[KVSCRATCH_DTYPE_I64] = { "i64", 8 },
	[KVSCRATCH_DTYPE_I32] = { "i32", 4 },
	[KVSCRATCH_DTYPE_I16] = { "i16", 2 },
	[KVSCRATCH_DTYPE_I8] = { "i8", 1 },
	[KVSCRATCH_DTYPE_U8] = { "u8", 1 },
	[KVSCRATCH_DTYPE_MXINT8] = { "mxint8", 1 },
};

const char *kvscratch_dtype_name(uint32_t dtype)
{
	return dtype < ARRAY_SIZE(dtypes) ? dtypes[dtype].name : NULL;
}

uint32_t kvscratch_dtype_size(uint32_t dtype)
{
	return dtype < ARRAY_SIZE(dtypes) ? dtypes[dtype].size : 0;
}

uint32_t kvscratch_dtype_by_name(const char *name)
{
	for (uint32_t dtype = 1; dtype < ARRAY_SIZE(dtypes); dtype++)
		if (!strcasecmp(name, dtypes[dtype].name))
			return dtype;
	return 0;
}

const char *kvscratch_strerror(int err)
{
	switch (abs(err)) {
	case ENOENT:
	case ENODEV:
	case ENXIO:
		return "no such device: is the module loaded?";
	case EACCES:
		return "no permission on the device, or not with this handle";
	case E2BIG:
		return "the module is too old for what was asked";
	case EBADF:
		return "not open, or not for this";
	case EBUSY:
		return "another handle is the pad's writer";
	case EROFS:
		return "the pad is sealed";
	case ESTALE:
		return "another handle took over as the pad's writer";
	case ENOLCK:
		return "the handle is not the pad's writer";
	case ECANCELED:
		return "the pad has changed";
	case ETXTBSY:
		return "another pad shares rows that would be dropped; fork those that are to stay";
	case EDQUOT:
		return "larger than the module's limits allow";
	case EFBIG:
		return "File too large: pads without the module are files, see ulimit -f";
	case EINVAL:
		return "a value that the pad or the format does not allow";
	case ENOMEM:
		return "out of memory, or the memory cgroup is full";
	case ENOSPC:
		return "the pad is full";
	case EDOM:
		return "a NaN or an infinity has no integer";
	case ENOTTY:
		return "not a handle of /dev/kvscratch";
	default:
		return strerror(abs(err));
	}
}
