// The part of TensorRT's runtime that a generated program uses, on the host: the engine looks each row up in a table
// (the file that STAND_IN_TABLE names) of the bytes of its inputs, in the order of their names, and of its output.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>

#include "cuda_runtime_api.h"

namespace nvinfer1 {

struct Dims {
    int32_t nbDims;
    int64_t d[8];
};

class ILogger {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2 };
    virtual void log(Severity severity, const char* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IExecutionContext {
public:
    IExecutionContext() {
        std::ifstream file(std::getenv("STAND_IN_TABLE"), std::ios::binary);
        table.assign(std::istreambuf_iterator<char>(file), {});
    }
    bool setInputShape(const char* name, const Dims& shape) {
        shapes[name] = shape;
        return shape.d[0] >= number(0) && shape.d[0] <= number(1);
    }
    bool setTensorAddress(const char* name, void* address) {
        addresses[name] = address;
        return true;
    }
    Dims getTensorShape(const char*) const {
        Dims shape{};
        shape.nbDims = int32_t(number(5)) + 1;
        shape.d[0] = shapes.begin()->second.d[0];
        for (int32_t axis = 1; axis < shape.nbDims; ++axis) shape.d[axis] = number(5 + axis);
        return shape;
    }
    bool enqueueV3(cudaStream_t) {
        const int64_t rows = shapes.begin()->second.d[0], known = number(2), given = number(3), made = number(4);
        const char* lines = table.data() + 8 * (6 + number(5));
        char* output = nullptr;
        for (auto& [name, address] : addresses) {
            if (!shapes.count(name)) output = static_cast<char*>(address);
        }
        for (int64_t row = 0; row < rows; ++row) {
            std::string key;
            for (auto& [name, shape] : shapes) {
                size_t bytes = std::stoul(std::string(std::getenv(("BYTES_" + name).c_str())));
                for (int32_t axis = 1; axis < shape.nbDims; ++axis) bytes *= size_t(shape.d[axis]);
                key.append(static_cast<char*>(addresses.at(name)) + row * bytes, bytes);
            }
            if (int64_t(key.size()) != given) return false;
            std::memset(output + row * made, 0xff, made);  // not a number, where the row is not known
            for (int64_t line = 0; line < known; ++line) {
                const char* at = lines + line * (given + made);
                if (!std::memcmp(at, key.data(), given)) std::memcpy(output + row * made, at + given, made);
            }
        }
        return true;
    }

private:
    int64_t number(int64_t index) const {
        int64_t value = 0;
        std::memcpy(&value, table.data() + 8 * index, 8);
        return value;
    }
    std::string table;
    std::map<std::string, Dims> shapes;
    std::map<std::string, void*> addresses;
};

class ICudaEngine {
public:
    IExecutionContext* createExecutionContext() { return new IExecutionContext; }
};

class IRuntime {
public:
    ICudaEngine* deserializeCudaEngine(const void*, size_t size) { return size ? new ICudaEngine : nullptr; }
};

inline IRuntime* createInferRuntime(ILogger&) { return new IRuntime; }

}  // namespace nvinfer1
