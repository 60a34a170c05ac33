// Switching between the threads of a block: stacks and registers.
#include "internal.h"

#if PREQUANT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && !defined(PREQUANT_UCONTEXT)
#define PREQUANT_OWN_SWITCH
// Saves the callee-saved registers, changes stacks, restores: about 2 ns. swapcontext asks the system for the signal
// mask, 0.3 us.
extern "C" void prequant_switch_stacks(void** saved, void* next);
asm(R"(
.text
.p2align 4
.globl prequant_switch_stacks
.hidden prequant_switch_stacks
.type prequant_switch_stacks,@function
prequant_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size prequant_switch_stacks,.-prequant_switch_stacks
)");
#else
#include <ucontext.h>
#endif

namespace prequant::emulator {

__thread __attribute__((tls_model("initial-exec"))) Thread* current = nullptr;

#ifdef PREQUANT_OWN_SWITCH
static void switch_stacks(void** saved, void* next) { prequant_switch_stacks(saved, next); }
#else
static void switch_stacks(void** saved, void* next) {
    static thread_local ucontext_t scheduler;  // a fiber's own is made with it
    if (*saved == nullptr) *saved = &scheduler;
    swapcontext(static_cast<ucontext_t*>(*saved), static_cast<ucontext_t*>(next));
}
#endif

void switch_to_scheduler([[maybe_unused]] bool is_last_time) {
    Block* block = current->block;
    Fiber* fiber = current->fiber;
#if PREQUANT_ASAN
    __sanitizer_start_switch_fiber(is_last_time ? nullptr : &fiber->asan_stack, block->scheduler_stack,
                                   block->scheduler_stack_bytes);
#endif
    switch_stacks(&fiber->stack_pointer, block->scheduler_stack_pointer);
#if PREQUANT_ASAN
    __sanitizer_finish_switch_fiber(fiber->asan_stack, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
}

void switch_to_fiber(Block* block, Fiber* fiber) {
    current = &fiber->thread;
#if PREQUANT_ASAN
    __sanitizer_start_switch_fiber(&block->scheduler_asan_stack, fiber->stack, fiber->stack_bytes);
#endif
    switch_stacks(&block->scheduler_stack_pointer, fiber->stack_pointer);
#if PREQUANT_ASAN
    __sanitizer_finish_switch_fiber(block->scheduler_asan_stack, nullptr, nullptr);
#endif
    current = nullptr;
}

static void enter_fiber() {
    Block* block = current->block;
#if PREQUANT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
    block->body(block->environment);
    exit_thread();
}

void prepare_fiber(Fiber* fiber) {
#if PREQUANT_ASAN
    __asan_unpoison_memory_region(fiber->stack, fiber->stack_bytes);
#endif
#ifdef PREQUANT_OWN_SWITCH
    // Tops at the same offset in their pages would share a few sets of the cache.
    const size_t stagger = fiber->thread.linear % 32 * 128;
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber->stack + fiber->stack_bytes) - stagger) &
                                          ~uintptr_t(63));
    *--top = nullptr;                                       // a function is entered with rsp % 16 == 8
    *--top = reinterpret_cast<void*>(&enter_fiber);         // where ret goes
    for (int i = 0; i < 6; ++i) *--top = nullptr;           // the callee-saved registers
    fiber->stack_pointer = top;
#else
    auto* context = reinterpret_cast<ucontext_t*>(fiber->stack);  // at the far end of the stack
    fiber->stack_pointer = context;
    getcontext(context);
    context->uc_stack.ss_sp = fiber->stack + sizeof(ucontext_t);
    context->uc_stack.ss_size = fiber->stack_bytes - sizeof(ucontext_t);
    context->uc_link = nullptr;
    makecontext(context, enter_fiber, 0);
#endif
}

}  // namespace prequant::emulator
