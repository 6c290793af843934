// SPDX-License-Identifier: Apache-2.0
// How entry points answer: a status code, and a message where it is not ok. No exception leaves them.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdio>

#include "cuda/status.h"

namespace moe {

// What a kernel cannot take; printf's format. Names the argument, what came and what was expected.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
inline Status invalid(const char* format, ...) {
    Status status;
    status.code = StatusCode::invalid_argument;
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(status.message, sizeof(status.message), format, arguments);
    va_end(arguments);
    return status;
}

// The last thing an entry point does: hands the message out, cut to `size` bytes, and returns the code.
inline int finish(const Status& status, char* message, size_t size) {
    if (message != nullptr && size > 0) std::snprintf(message, size, "%s", status.message);
    return int(status.code);
}

}  // namespace moe
