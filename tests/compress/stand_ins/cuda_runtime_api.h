// The part of the CUDA runtime that a generated program uses, on the host.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>

using cudaStream_t = struct Stream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

inline const char* cudaGetErrorString(cudaError_t) { return "CUDA error"; }
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { *stream = reinterpret_cast<cudaStream_t>(7); return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** address, size_t size) {
    *address = std::malloc(size);
    return cudaSuccess;
}
inline cudaError_t cudaFree(void* address) { std::free(address); return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t) {
    std::memset(address, value, size);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(target, source, size);
    return cudaSuccess;
}
