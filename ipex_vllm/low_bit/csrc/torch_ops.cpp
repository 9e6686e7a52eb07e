// The torch operators over the matmuls and the rounding of weights, registered through torch's stable C interface (PyTorch 2.8 and later). Its
// functions are looked up in the process, so that no header of torch is needed and one library serves every version.
// Compiled with exceptions, which is how an operator fails. It is longer than other files because every operator is here,
// beside the one set of checks.
#include <dlfcn.h>
#include <omp.h>

#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "experts/experts.h"
#include "rounding/rounding.h"
#include "w16a16/w16a16.h"
#include "w4a8/w4a8.h"
#include "w8a16/w8a16.h"
#include "w8a8/w8a8.h"

namespace {

using Value = uint64_t; // an argument or a result: an integer, or a handle; who receives a handle has to free it
struct TensorObject;
using Handle = TensorObject *;
using Library = struct LibraryObject *;
using BoxedKernel = void (*)(Value *stack, uint64_t arguments, uint64_t results);
constexpr int32_t kCpu = 0;

// Functions of torch's shim.h; those that return int32_t return 0 unless they failed.
struct Torch {
    int32_t (*new_library)(const char *name_space, const char *key, const char *file, uint32_t line, Library *);
    int32_t (*implement)(Library, const char *name, BoxedKernel);
    int32_t (*delete_tensor)(Handle);
    int32_t (*data)(Handle, void **);
    int32_t (*dim)(Handle, int64_t *);
    int32_t (*numel)(Handle, int64_t *);
    int32_t (*sizes)(Handle, int64_t **);
    int32_t (*dtype)(Handle, int32_t *);
    int32_t (*is_contiguous)(Handle, bool *);
    int32_t (*empty)(int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device_type,
                     int32_t device_index, Handle *);
    int32_t (*copy)(Handle to, Handle from, int32_t non_blocking);
    int32_t (*float32)();
    int32_t (*float16)();
    int32_t (*bfloat16)();
    int32_t (*int32)();
    int32_t (*int8)();
    int32_t (*uint8)();

    bool find() {
        // Already in the process, or this is none of torch's.
        void *library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
        const auto found = [library](const char *name, auto &function) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
            return function != nullptr;
        };
        return library && found("aoti_torch_library_init_impl", new_library) &&
               found("aoti_torch_library_impl", implement) && found("aoti_torch_delete_tensor_object", delete_tensor) &&
               found("aoti_torch_get_data_ptr", data) && found("aoti_torch_get_dim", dim) &&
               found("aoti_torch_get_numel", numel) && found("aoti_torch_get_sizes", sizes) &&
               found("aoti_torch_get_dtype", dtype) && found("aoti_torch_is_contiguous", is_contiguous) &&
               found("aoti_torch_empty_strided", empty) && found("aoti_torch_copy_", copy) &&
               found("aoti_torch_dtype_float32", float32) && found("aoti_torch_dtype_float16", float16) &&
               found("aoti_torch_dtype_bfloat16", bfloat16) &&
               found("aoti_torch_dtype_int32", int32) && found("aoti_torch_dtype_int8", int8) &&
               found("aoti_torch_dtype_uint8", uint8);
    }
};

Torch torch;

[[noreturn]] void fail(const std::string &message) { throw std::runtime_error(message); }

void check(int32_t status) {
    if (status) fail("a call of torch's C interface failed; its message is on stderr");
}

struct DeleteTensor {
    void operator()(Handle handle) const { torch.delete_tensor(handle); }
};

// A tensor, or none.
class Tensor {
  public:
    explicit Tensor(Handle handle) : handle_(handle) {}

    explicit operator bool() const { return handle_ != nullptr; }
    Handle handle() const { return handle_.get(); }
    Handle release() { return handle_.release(); }

    void *data() const { return get(torch.data, static_cast<void *>(nullptr)); }
    int64_t numel() const { return get(torch.numel, int64_t(0)); }
    bool is_contiguous() const { return get(torch.is_contiguous, false); }
    int32_t torch_dtype() const { return get(torch.dtype, int32_t(0)); }
    std::vector<int64_t> sizes() const {
        const int64_t dim = get(torch.dim, int64_t(0));
        const int64_t *sizes = get(torch.sizes, static_cast<int64_t *>(nullptr));
        return {sizes, sizes + dim};
    }
    // What the kernels call its dtype; -1 for one they do not take.
    int32_t dtype() const {
        const int32_t dtype = torch_dtype();
        return dtype == torch.float32()    ? common::kFloat32
               : dtype == torch.float16()  ? common::kFloat16
               : dtype == torch.bfloat16() ? common::kBFloat16
                                           : -1;
    }

  private:
    template <class T> T get(int32_t (*function)(Handle, T *), T value) const {
        check(function(handle_.get(), &value));
        return value;
    }

    std::unique_ptr<TensorObject, DeleteTensor> handle_;
};

Tensor take_tensor(Value value) { return Tensor(reinterpret_cast<Handle>(value)); }

// None is a null pointer, a tensor a pointer to its handle.
Tensor take_optional_tensor(Value value) {
    const Value *pointer = reinterpret_cast<const Value *>(value);
    Tensor tensor(pointer ? reinterpret_cast<Handle>(*pointer) : nullptr);
    delete pointer;
    return tensor;
}

Tensor empty(const std::vector<int64_t> &sizes, int32_t torch_dtype) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
    Handle handle;
    check(torch.empty(sizes.size(), sizes.data(), strides.data(), torch_dtype, kCpu, 0, &handle));
    return Tensor(handle);
}

// The tensor itself if its elements follow each other, else a copy of which that is true.
Tensor contiguous(Tensor tensor) {
    if (tensor.is_contiguous()) return tensor;
    Tensor copy = empty(tensor.sizes(), tensor.torch_dtype());
    check(torch.copy(copy.handle(), tensor.handle(), 0));
    return copy;
}

// What a matmul is called with; checked against each other.
struct Linear {
    Tensor x;
    Tensor packed;
    Tensor bias;
    int64_t outputs;
    std::vector<int64_t> sizes; // x's, then the result's
    int64_t inputs;
    int64_t rows;
    int32_t dtype;
    int32_t bias_dtype;

    Linear(const Value *stack)
        : x(take_tensor(stack[0])), packed(take_tensor(stack[1])), bias(take_optional_tensor(stack[2])),
          outputs(int64_t(stack[3])), sizes(x.sizes()), inputs(sizes.empty() ? 0 : sizes.back()),
          rows(inputs ? x.numel() / inputs : 0), dtype(x.dtype()), bias_dtype(bias ? bias.dtype() : common::kFloat32) {
        if (dtype < 0 || (bias_dtype != dtype && bias_dtype != common::kFloat32))
            fail("the kernels take float32, float16 or bfloat16, and a bias of that dtype or float32");
        if (sizes.empty()) fail("the kernels take [..., K], not a scalar");
        if (bias && bias.numel() != outputs)
            fail("a layer of " + std::to_string(outputs) + " outputs has a bias of " + std::to_string(bias.numel()));
        x = contiguous(std::move(x));
        sizes.back() = outputs;
    }

    void check_packed(const char *weights, int64_t bytes) const {
        if (packed.numel() != bytes)
            fail(std::string(weights) + " weights of " + std::to_string(packed.numel()) + " bytes are not [" +
                 std::to_string(outputs) + ", " + std::to_string(inputs) + "]");
    }

    // multiply(x, packed, bias, out, rows) is one of the library's matmuls.
    template <class Multiply> Value result(const Multiply &multiply) {
        Tensor out = empty(sizes, x.torch_dtype());
        if (multiply(x.data(), packed.data(), bias ? bias.data() : nullptr, out.data(), rows))
            throw std::bad_alloc();
        return reinterpret_cast<Value>(out.release());
    }
};

int32_t usable(int64_t requested, int32_t detected, const char *weights) {
    if (detected == 0) fail(std::string("the ") + weights + " kernel needs a CPU with AVX2, FMA and F16C");
    return requested ? int32_t(requested) : detected;
}

void w4a8_operator(Value *stack, uint64_t, uint64_t) {
    Linear linear(stack);
    const int64_t group = int64_t(stack[4]);
    const bool symmetric = stack[5] & 1;
    const int32_t table = int32_t(stack[7]);
    const w4a8::Weights weights{nullptr, linear.outputs, linear.inputs, group, symmetric, w4a8::Table(table)};
    if (table < 0 || table > w4a8::kFp4 || (table && !symmetric)) fail("int4 weights have no such table");
    if ((group != 32 && group != 64 && group != 128) || linear.inputs % group)
        fail("int4 weights have groups of 32, 64 or 128 inputs: " + std::to_string(linear.inputs) +
             " are not divided by " + std::to_string(group));
    linear.check_packed("int4", weights.tiles() * weights.groups() * weights.block_bytes());
    const int32_t isa = usable(int64_t(stack[6]), w4a8_isa(linear.rows), "int4");
    stack[0] = linear.result([&](auto... tensors_and_rows) {
        return w4a8_linear(tensors_and_rows..., linear.outputs, linear.inputs, group, symmetric, table, linear.dtype,
                           linear.bias_dtype, isa, omp_get_max_threads());
    });
}

void w8a8_operator(Value *stack, uint64_t, uint64_t) {
    Linear linear(stack);
    const int64_t group = int64_t(stack[4]);
    const w8a8::Weights weights{nullptr, linear.outputs, linear.inputs, group};
    if ((group != 0 && group != 32 && group != 64) || (group && linear.inputs % group))
        fail("int8 weights have groups of 32 or 64 inputs, or 0 for a scale per output: " +
             std::to_string(linear.inputs) + " are not divided by " + std::to_string(group));
    linear.check_packed("int8", weights.tiles() * weights.tile_bytes());
    const int32_t isa = usable(int64_t(stack[5]), w8a8_isa(linear.rows), "int8");
    stack[0] = linear.result([&](auto... tensors_and_rows) {
        return w8a8_linear(tensors_and_rows..., linear.outputs, linear.inputs, group, linear.dtype, linear.bias_dtype,
                           isa, omp_get_max_threads());
    });
}

void w8a16_operator(Value *stack, uint64_t, uint64_t) {
    Linear linear(stack);
    const int64_t group = int64_t(stack[4]);
    const int32_t format = int32_t(stack[5]);
    const w8a16::Weights weights{nullptr, linear.outputs, linear.inputs, group, w8a16::Format(format)};
    if ((group != 0 && group != 32 && group != 64 && group != 128) || (group && linear.inputs % group))
        fail("8-bit float weights have groups of 32, 64 or 128 inputs, or 0 for a scale per output: " +
             std::to_string(linear.inputs) + " are not divided by " + std::to_string(group));
    linear.check_packed("8-bit float", weights.tiles() * weights.groups() * weights.block_bytes());
    const int32_t isa = usable(int64_t(stack[6]), w8a16_isa(linear.dtype), "fp8");
    stack[0] = linear.result([&](auto... tensors_and_rows) {
        return w8a16_linear(tensors_and_rows..., linear.outputs, linear.inputs, group, format, linear.dtype,
                            linear.bias_dtype, isa, omp_get_max_threads());
    });
}

void w16a16_operator(Value *stack, uint64_t, uint64_t) {
    Linear linear(stack);
    const int32_t weight_dtype = linear.packed.dtype();
    if (weight_dtype != common::kFloat16 && weight_dtype != common::kBFloat16)
        fail("16-bit weights are float16 or bfloat16");
    const w16a16::Weights weights{nullptr, linear.outputs, linear.inputs, common::DType(weight_dtype)};
    linear.check_packed("16-bit", weights.tiles() * weights.lines() * w16a16::kLineBytes / 2);
    const int32_t isa = usable(int64_t(stack[4]), w16a16_isa(), "16-bit");
    stack[0] = linear.result([&](auto... tensors_and_rows) {
        return w16a16_linear(tensors_and_rows..., linear.outputs, linear.inputs, weight_dtype, linear.dtype,
                             linear.bias_dtype, isa, omp_get_max_threads());
    });
}

void experts_operator(Value *stack, uint64_t, uint64_t) {
    const Tensor x = contiguous(take_tensor(stack[0])), gate_up = take_tensor(stack[1]), down = take_tensor(stack[2]);
    const Tensor gate_up_bias = take_optional_tensor(stack[3]), down_bias = take_optional_tensor(stack[4]);
    const Tensor weights = contiguous(take_tensor(stack[5])), ids = contiguous(take_tensor(stack[6]));
    ExpertsCall call{};
    call.gate_up_format = int32_t(stack[7]);
    call.down_format = int32_t(stack[8]);
    call.intermediate = int64_t(stack[9]);
    call.gate_up_group = int64_t(stack[10]);
    call.down_group = int64_t(stack[11]);
    call.activation = int32_t(stack[12]);
    const auto sizes = x.sizes(), chosen = ids.sizes(), packed = gate_up.sizes(), packed_down = down.sizes();
    if (sizes.size() != 2 || packed.size() != 2 || packed_down.size() != 2)
        fail("experts take x [tokens, hidden] and weights [experts, bytes]");
    if (chosen.size() != 2 || chosen[0] != sizes[0] || chosen[1] > 64 || weights.sizes() != chosen)
        fail("experts' weights and ids are [tokens, chosen], of at most 64 each");
    if (ids.torch_dtype() != torch.int32() || weights.dtype() != common::kFloat32 || x.dtype() < 0)
        fail("experts take float32, float16 or bfloat16, float32 weights and int32 ids");
    for (const int32_t format : {call.gate_up_format, call.down_format})
        if (format < 0 || format > experts::kE5M2) fail("experts have no such format");
    if (call.activation < 0 || call.activation > experts::kClampedSwiglu) fail("experts have no such activation");
    call.tokens = sizes[0];
    call.hidden = sizes[1];
    call.chosen = chosen[1];
    call.experts = packed[0];
    const auto divides = [&](int64_t group, int64_t inputs, int32_t format) {
        if (group == 0) return format >= experts::kInt8;
        const bool is_known = group == 32 || group == 64 || (group == 128 && format != experts::kInt8);
        return is_known && inputs % group == 0;
    };
    if (!divides(call.gate_up_group, call.hidden, call.gate_up_format) || call.intermediate % common::kTileOutputs ||
        !divides(call.down_group, call.intermediate, call.down_format))
        fail("experts have an intermediate size that 32 divides, and groups that divide the inputs");
    const auto checked = [&](const Tensor &tensor, const auto &weights) {
        const auto shape = tensor.sizes();
        if (shape[0] != call.experts || shape[1] != weights.tiles() * experts::tile_bytes(weights) ||
            !tensor.is_contiguous())
            fail("packed experts of " + std::to_string(shape[1]) + " bytes each are not [" +
                 std::to_string(weights.outputs) + ", " + std::to_string(weights.inputs) + "]");
        return static_cast<const uint8_t *>(tensor.data());
    };
    const int32_t status = experts::with_weights(call, [&](const auto &gate_up_weights, const auto &down_weights) {
        call.gate_up = checked(gate_up, gate_up_weights);
        call.down = checked(down, down_weights);
        return 0;
    });
    if (status) fail("experts are of integers or of 8-bit floats, not of both");
    const auto bias_of = [&](const Tensor &bias, int64_t outputs) -> const float * {
        if (!bias) return nullptr;
        if (bias.numel() != call.experts * outputs || bias.dtype() != common::kFloat32 || !bias.is_contiguous())
            fail("experts' biases are float32 [experts, outputs]");
        return static_cast<const float *>(bias.data());
    };
    call.gate_up_bias = bias_of(gate_up_bias, 2 * call.intermediate);
    call.down_bias = bias_of(down_bias, call.hidden);
    Tensor out = empty(sizes, x.torch_dtype());
    call.x = x.data();
    call.weights = static_cast<const float *>(weights.data());
    call.ids = static_cast<const int32_t *>(ids.data());
    call.out = out.data();
    call.dtype = x.dtype();
    usable(0, w4a8_isa(1), "experts'"); // the least that any of the three matmuls needs
    call.isa = int32_t(stack[13]);
    call.threads = omp_get_max_threads();
    if (experts_forward(&call)) throw std::bad_alloc();
    stack[0] = reinterpret_cast<Value>(out.release());
}

void round_integers_operator(Value *stack, uint64_t, uint64_t) {
    const Tensor values = contiguous(take_tensor(stack[0]));
    Tensor importance = take_optional_tensor(stack[1]);
    const Tensor tried = contiguous(take_tensor(stack[2]));
    if (importance) importance = contiguous(std::move(importance));
    const bool is_symmetric = stack[4] & 1;
    RoundingCall call{};
    call.bits = int32_t(stack[3]);
    const auto sizes = values.sizes();
    if (sizes.size() != 3 || values.dtype() != common::kFloat32 || sizes[2] == 0)
        fail("what is rounded to integers is float32 [rows, groups, size]");
    if (importance && (importance.dtype() != common::kFloat32 || importance.sizes() != std::vector<int64_t>{sizes[1], sizes[2]}))
        fail("the importance of what is rounded is float32 [groups, size]");
    if (tried.dtype() != common::kFloat32 || tried.numel() == 0) fail("what a search tries is float32, at least one");
    if (call.bits != 4 && call.bits != 5 && (call.bits != 8 || !is_symmetric))
        fail("integers have 4 or 5 bits, or 8 that are symmetric");
    const std::vector<int64_t> per_group{sizes[0], sizes[1], 1};
    const int32_t scale_dtype = call.bits == 8 ? torch.float32() : torch.float16();
    Tensor codes = empty(sizes, call.bits == 8 ? torch.int8() : torch.uint8());
    Tensor scales = empty(per_group, scale_dtype);
    Tensor mins = empty(is_symmetric ? std::vector<int64_t>{0} : per_group, scale_dtype);
    call.values = static_cast<const float *>(values.data());
    call.importance = importance ? static_cast<const float *>(importance.data()) : nullptr;
    call.tried = static_cast<const float *>(tried.data());
    call.codes = static_cast<uint8_t *>(codes.data());
    call.scales = scales.data();
    call.mins = is_symmetric ? nullptr : static_cast<uint16_t *>(mins.data());
    call.rows = sizes[0];
    call.groups = sizes[1];
    call.size = sizes[2];
    call.candidates = tried.numel();
    call.isa = rounding_isa();
    call.threads = omp_get_max_threads();
    if (rounding_round(&call)) throw std::bad_alloc();
    stack[0] = reinterpret_cast<Value>(codes.release());
    stack[1] = reinterpret_cast<Value>(scales.release());
    stack[2] = reinterpret_cast<Value>(mins.release());
}

} // namespace

#pragma GCC visibility push(default)
extern "C" {
// Give torch the implementations of ipex_vllm::w4a8_linear and its siblings, whose schemas Python defines.
// Returns 0, or -1 when this torch has no stable C interface.
int32_t register_torch_operators() {
    Library library;
    if (!torch.find() || torch.new_library("ipex_vllm", "CPU", __FILE__, __LINE__, &library)) return -1;
    if (torch.implement(library, "w4a8_linear", w4a8_operator)) return -1;
    if (torch.implement(library, "w8a8_linear", w8a8_operator)) return -1;
    if (torch.implement(library, "w16a16_linear", w16a16_operator)) return -1;
    if (torch.implement(library, "experts", experts_operator)) return -1;
    // Where this has no code for the CPU, Python's own implementation stays.
    if (rounding_isa() && torch.implement(library, "round_integers", round_integers_operator)) return -1;
    return torch.implement(library, "w8a16_linear", w8a16_operator) ? -1 : 0;
}
}
#pragma GCC visibility pop
