// Lexer turns PTX text into tokens; the Raw types hold what the parser makes of them.
#pragma once
#include <cctype>
#include <cstdarg>
#include <cstdlib>
#include <map>
#include <memory>

#include "base.h"

std::string strf(const char* fmt, ...) {
  char buf[2048];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(buf, sizeof buf, fmt, ap);
  va_end(ap);
  return buf;
}

enum class Tok : u8 { end, ident, integer, float32, float64, string, punct };
struct Token {
  Tok kind = Tok::end;
  std::string text;
  u64 bits = 0;
  int line = 0;
};

class Lexer {
 public:
  Lexer(const char* p, size_t n) : p_(p), e_(p + n) {}
  std::vector<Token> run() {
    std::vector<Token> out;
    for (;;) {
      Token t = next();
      out.push_back(t);
      if (t.kind == Tok::end) return out;
    }
  }

 private:
  const char *p_, *e_;
  int line_ = 1;
  static bool head(char c) { return isalpha((u8)c) || c == '_' || c == '$' || c == '%' || c == '.'; }
  static bool tail(char c) { return isalnum((u8)c) || c == '_' || c == '$' || c == '%' || c == '.'; }
  void skip_blank() {
    while (p_ < e_) {
      if (*p_ == '\n') {
        line_++;
        p_++;
      } else if (isspace((u8)*p_))
        p_++;
      else if (p_[0] == '/' && p_ + 1 < e_ && p_[1] == '/') {
        while (p_ < e_ && *p_ != '\n') p_++;
      } else if (p_[0] == '/' && p_ + 1 < e_ && p_[1] == '*') {
        p_ += 2;
        while (p_ + 1 < e_ && !(p_[0] == '*' && p_[1] == '/')) {
          if (*p_ == '\n') line_++;
          p_++;
        }
        p_ += 2;
      } else
        break;
    }
  }
  Token next() {
    skip_blank();
    Token t;
    t.line = line_;
    if (p_ >= e_ || !*p_) return t;
    const char* s = p_;
    if (*p_ == '"') {
      for (p_++; p_ < e_ && *p_ != '"'; p_++)
        if (*p_ == '\\') p_++;
      t.kind = Tok::string;
      t.text.assign(s + 1, p_ - s - 1);
      p_++;
    } else if (isdigit((u8)*p_)) {
      number(t);
    } else if (head(*p_)) {
      p_++;
      while (p_ < e_ && (tail(*p_) || (p_[0] == ':' && p_[1] == ':' && (p_ += 1)))) p_++;
      t.kind = Tok::ident;
      t.text.assign(s, p_ - s);
    } else {
      t.kind = Tok::punct;
      t.text.assign(1, *p_++);
    }
    return t;
  }
  void number(Token& t) {
    auto hexfloat = [&](int digits) {
      std::string h(p_ + 2, digits);
      p_ += 2 + digits;
      return strtoull(h.c_str(), nullptr, 16);
    };
    char c = p_[1];
    char* end;
    if (p_[0] == '0' && (c == 'f' || c == 'F')) {
      t.kind = Tok::float32;
      t.bits = hexfloat(8);
    } else if (p_[0] == '0' && (c == 'd' || c == 'D')) {
      t.kind = Tok::float64;
      t.bits = hexfloat(16);
    } else {
      const char* q = p_;
      while (isdigit((u8)*q)) q++;
      if (p_[0] != '0' || (c != 'x' && c != 'X')) {
        if (*q == '.' || *q == 'e' || *q == 'E') {
          t.kind = Tok::float64;
          t.bits = bitcast<u64>(strtod(p_, &end));
          p_ = end;
          return;
        }
      }
      t.kind = Tok::integer;
      if (p_[0] == '0' && (c == 'b' || c == 'B')) {
        t.bits = strtoull(p_ + 2, &end, 2);
      } else
        t.bits = strtoull(p_, &end, 0);
      p_ = end;
      if (*p_ == 'U') p_++;
    }
  }
};

// RawOp is an operand as written.
struct RawOp {
  enum K : u8 { name, integer, f32, f64, vec, addr, pair, list } k = name;
  // text is the name; of an address it is the base's name ("" if absolute).
  std::string text;
  // neg stands for !pred.
  bool neg = false;
  // bits is an immediate, or the offset of an address.
  u64 bits = 0;
  // sub holds the elements of a vec, pair or list, and the extra operands (tensor coordinates) of an address.
  std::vector<RawOp> sub;
};
struct VarDecl {
  std::string space, name;
  Ty type = Ty::none;
  int align = 0;
  int vec = 1;
  // count is the number of array elements; an unsized extern array has -1.
  i64 count = 1;
  // range is that of %r<range>.
  int range = 0;
  bool array = false, ext = false, is_ptr = false;
  // init holds values, or values + symbols.
  std::vector<std::pair<u64, std::string>> init;
  std::vector<bool> init_float;
  int line = 0;
};
struct RawStmt {
  enum K : u8 { inst, label, open, close, decl, loc, targets } k = inst;
  int line = 0;
  // text is the opcode, the label, or the label of the targets.
  std::string text;
  std::string guard;
  bool guard_neg = false;
  std::vector<RawOp> ops;
  VarDecl var;
  int file = 0, src_line = 0;
  std::vector<std::string> names;
};
struct RawFunc {
  std::string name;
  bool entry = false, defined = false;
  std::vector<VarDecl> params, rets;
  std::vector<RawStmt> body;
  int reqntid[3] = {0, 0, 0};
  int maxntid[3] = {0, 0, 0};
  int line = 0;
};
struct RawModule {
  std::string target;
  std::map<int, std::string> files;
  std::vector<VarDecl> globals;
  std::map<std::string, RawFunc> funcs;
};
