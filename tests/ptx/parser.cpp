// Modules, functions and declarations. Instructions are in parser_instructions.cpp.
#include "parser.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "opcode.h"

namespace ptx {
namespace {

constexpr uint32_t kFrameAlign = 16;

uint32_t align_up(uint32_t value, uint32_t align) {
  return (value + align - 1) / align * align;
}

// One behind the other; the bytes of all.
uint32_t lay_out(std::vector<Parameter>* parameters, uint32_t begin) {
  for (Parameter& parameter : *parameters) {
    parameter.offset = align_up(begin, parameter.align);
    begin = parameter.offset + parameter.size;
  }
  return begin;
}

}  // namespace

std::unique_ptr<Module> parse(const std::string& text) {
  return Parser(text).run();
}

std::unique_ptr<Module> Parser::run() {
  while (!word().empty()) {
    if (word() == ".version" || word() == ".target") {
      const uint32_t line = words_[at_].line;
      while (!word().empty() && words_[at_].line == line) ++at_;
      continue;
    }
    if (accept(".address_size")) {
      ++at_;
      continue;
    }
    size_t ahead = 0;
    while (word(ahead) == ".visible" || word(ahead) == ".weak" || word(ahead) == ".extern") ++ahead;
    const std::string& kind = word(ahead);
    if (kind == ".entry" || kind == ".func") {
      parse_function();
    } else if (kind == ".global" || kind == ".const" || kind == ".shared") {
      parse_variable();
    } else {
      fail("unexpected " + word());
    }
  }
  link_calls();
  return std::move(module_);
}

bool Parser::accept(const char* what) {
  if (word() != what) return false;
  ++at_;
  return true;
}

void Parser::expect(const char* what) {
  if (!accept(what)) fail(std::string("expected ") + what + ", not " + word());
}

void Parser::fail(const std::string& why) const {
  throw std::runtime_error("PTX line " + std::to_string(words_[at_].line) + ": " + why);
}

// The bits of an integer, or of 0f... and 0d..., which give those of a float in hexadecimal.
uint64_t Parser::take_number() {
  const bool negative = accept("-");
  std::string digits = take();
  if (digits.empty() || !std::isdigit(static_cast<unsigned char>(digits[0]))) fail("expected a number, not " + digits);
  int base = 0;
  if (digits.size() > 2 && std::strchr("dDfF", digits[1]) != nullptr) {
    digits = digits.substr(2);
    base = 16;
  }
  const uint64_t value = std::strtoull(digits.c_str(), nullptr, base);
  return negative ? 0 - value : value;
}

// .align 8 .b8 name[16]
Parser::Declaration Parser::parse_declaration() {
  Declaration d;
  for (;;) {
    if (accept(".visible") || accept(".weak")) continue;
    if (!accept(".extern")) break;
    d.is_external = true;
  }
  d.space = take();
  while (word()[0] == '.') {
    const std::string part = take();
    if (part == ".align") {
      const auto align = static_cast<uint32_t>(take_number());
      if (d.type == Type::none) d.align = align;  // else it is that of what a pointer points to
    } else if (type_named(part.substr(1)) != Type::none) {
      d.type = type_named(part.substr(1));
    } else if (part != ".ptr" && part != ".global" && part != ".const" && part != ".shared" && part != ".local") {
      fail("unknown " + part);
    }
  }
  d.name = take();
  if (accept("[")) {
    d.count = word() == "]" ? 0 : static_cast<uint32_t>(take_number());
    expect("]");
  }
  d.size = size_of(d.type) * d.count;
  d.align = std::max(d.align, size_of(d.type));
  return d;
}

Parameter Parser::parse_parameter() {
  const Declaration d = parse_declaration();
  if (d.space != ".param") fail("expected a parameter, not " + d.space);
  return {d.name, d.size, 0, d.align};
}

std::vector<Parameter> Parser::parse_parameters() {
  std::vector<Parameter> all;
  expect("(");
  while (!accept(")")) {
    all.push_back(parse_parameter());
    accept(",");
  }
  return all;
}

void Parser::parse_function() {
  while (accept(".visible") || accept(".weak") || accept(".extern")) continue;
  auto function = std::make_unique<Function>();
  function_ = function.get();
  function_->is_entry = take() == ".entry";
  if (word() == "(") function_->results = parse_parameters();
  function_->name = take();
  if (word() == "(") function_->parameters = parse_parameters();
  while (word() != "{" && word() != ";") {
    const std::string directive = take();
    if (directive == ".maxntid" || directive == ".reqntid") {
      function_->most_threads = static_cast<uint32_t>(take_number());
      while (accept(",")) function_->most_threads *= static_cast<uint32_t>(take_number());
    } else if (directive == ".minnctapersm" || directive == ".maxnreg") {
      ++at_;
    } else if (directive != ".noreturn") {
      fail("unknown " + directive);
    }
  }
  if (accept(";")) return;  // a declaration of what comes later
  function_->parameter_bytes = lay_out(&function_->parameters, 0);
  if (!function_->is_entry) {
    function_->frame = align_up(lay_out(&function_->results, function_->parameter_bytes), kFrameAlign);
  }
  module_->numbers[function_->name] = static_cast<uint32_t>(module_->functions.size());
  module_->functions.push_back(std::move(function));
  parse_body();
}

void Parser::parse_body() {
  expect("{");
  scopes_.assign(1, {});
  labels_.clear();
  branches_.clear();
  while (!scopes_.empty()) {
    if (word().empty()) fail("a function without an end");
    if (accept("{")) {
      scopes_.emplace_back();
    } else if (accept("}")) {
      scopes_.pop_back();
    } else if (word() == ".reg") {
      declare_registers();
    } else if (word() == ".local" || word() == ".param" || word() == ".shared") {
      declare_in_frame();
    } else if (accept(".pragma")) {
      while (!accept(";")) ++at_;
    } else if (word(1) == ":") {
      labels_[take()] = static_cast<uint32_t>(function_->code.size());
      ++at_;
    } else {
      parse_instruction();
    }
  }
  Instruction end;
  end.text = "(the function's end)";
  decode("ret", end);
  function_->code.push_back(end);
  for (const auto& [instruction, label] : branches_) {
    const auto found = labels_.find(label);
    if (found == labels_.end()) fail("no label " + label);
    function_->code[instruction].target = found->second;
  }
}

// .reg .b32 %r<12>;
void Parser::declare_registers() {
  expect(".reg");
  ++at_;  // their type
  do {
    const std::string name = take();
    if (accept("<")) {
      const uint64_t count = take_number();
      expect(">");
      for (uint64_t i = 0; i < count; ++i) scopes_.back().registers[name + std::to_string(i)] = function_->registers++;
    } else {
      scopes_.back().registers[name] = function_->registers++;
    }
  } while (accept(","));
  expect(";");
}

void Parser::declare_in_frame() {
  const Declaration d = parse_declaration();
  expect(";");
  if (d.space == ".shared") return place_in_shared(d);
  function_->frame = align_up(function_->frame, std::max(d.align, kFrameAlign));
  scopes_.back().memory[d.name] = {function_->frame, d.size};
  function_->frame += d.size;
}

void Parser::place_in_shared(const Declaration& d) {
  // That of unknown size lies behind all others, which are declared before it is.
  module_->shared_bytes = align_up(module_->shared_bytes, d.is_external ? std::max(d.align, 16u) : d.align);
  module_->shared[d.name] = module_->shared_bytes;
  module_->shared_bytes += d.size;
}

void Parser::parse_variable() {
  const Declaration d = parse_declaration();
  if (d.space == ".shared") {
    place_in_shared(d);
  } else {
    constexpr uint32_t kAlign = 256;
    auto& memory = module_->memory.emplace_back(new char[d.size + kAlign]());
    const uint64_t address = (reinterpret_cast<uint64_t>(memory.get()) + kAlign - 1) / kAlign * kAlign;
    module_->variables[d.name] = {address, d.size};
    if (accept("=")) initialize(reinterpret_cast<char*>(address), size_of(d.type));
  }
  expect(";");
}

void Parser::initialize(char* memory, uint32_t element) {
  const bool several = accept("{");
  do {
    const uint64_t value = take_number();
    std::memcpy(memory, &value, element);
    memory += element;
  } while (several && accept(","));
  if (several) expect("}");
}

void Parser::link_calls() {
  for (const Call& call : calls_) {
    const auto found = module_->numbers.find(call.callee);
    if (found == module_->numbers.end()) throw std::runtime_error("PTX: no function " + call.callee);
    const Function& callee = *module_->functions[found->second];
    Instruction& in = module_->functions[call.function]->code[call.instruction];
    in.target = found->second;
    const auto pass = [&](const std::vector<Place>& given, const std::vector<Parameter>& taken) {
      if (given.size() != taken.size()) throw std::runtime_error("PTX: a wrong number of arguments for " + call.callee);
      std::vector<Passed> all;
      for (size_t i = 0; i < given.size(); ++i) {
        if (given[i].size != taken[i].size) throw std::runtime_error("PTX: a wrong argument of " + call.callee);
        all.push_back({given[i].offset, taken[i].offset, taken[i].size});
      }
      return all;
    };
    in.arguments = pass(call.arguments, callee.parameters);
    in.results = pass(call.results, callee.results);
  }
}

}  // namespace ptx
