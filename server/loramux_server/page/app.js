var S,bn,Tt,se,Ct,et,yn,Ze,wn,At,Et,Jr,Le=Symbol.for("pv"),tt={},nt=[],Kr=/^m(i|n|o|s|text|space)$/,Mt=Array.isArray,Ot=nt.slice,me=Object.assign;function fe(e){e&&e.parentNode&&e.remove()}function rt(e,t,n){var r,a,o,s={},i=arguments.length;for(o in t)o=="key"?r=t[o]:o=="ref"&&typeof e!="function"?a=t[o]:s[o]=t[o];return i>2&&(s.children=i>3?Ot.call(arguments,2):n),je(e,s,r,a,null)}function je(e,t,n,r,a){var o={type:e,props:t,key:n,ref:r,__k:null,__:null,__b:0,__e:null,__c:null,constructor:Le,__v:a||++bn,__i:-1,__u:0};return!a&&S.vnode&&S.vnode(o),o}function he(e){return e.children}function xe(e,t){this.props=e,this.context=t,this.__g=0}function ie(e,t){if(t==null)return e.__&&ie(e.__,e.__i+1);for(var n;t<e.__k.length;t++)if((n=e.__k[t])&&n.__e)return n.__e;return typeof e.type!="function"||e.props.__P?null:ie(e)}function Vr(e){var t,n=e.__v,r=n.__e,a=[],o=[],s=e.__P;s&&((t=me({constructor:Le},n)).__v=n.__v+1,S.vnode&&S.vnode(t),Pt(s,t,n,e.__n,s.namespaceURI,32&n.__u?[r]:null,a,r||ie(n),32&n.__u,o),t.__v=n.__v,t.__.__k[t.__i]=t,Tn(a,t,o),n.__=n.__e=null,t.__e!=r&&xn(t))}function xn(e){if((e=e.__)&&e.__c&&!e.props.__P)return e.__e=null,e.__k.some(function(t){return t&&(e.__e=t.__e)}),xn(e)}function gn(e){(8&e.__g||(e.__g|=8,se.push(e),et++))&&Ct==S.debounceRendering||((Ct=S.debounceRendering)||queueMicrotask)(kn)}function kn(){try{for(var e,t=1;se.length;)se.length>t&&se.sort(yn),e=se.shift(),t=se.length,8&e.__g&&Vr(e)}finally{(et=se.length)&&(Ct||queueMicrotask)(kn)}}function Sn(e,t,n,r,a,o,s,i,d,p,c){var h,f,u,_,y,g,$=r.__k||nt,b=t.length;for(d=Gr(n,t,$,d,b),h=0;h<b;h++)(u=n.__k[h])!=null&&(f=~u.__i&&$[u.__i]||tt,u.__i=h,g=Pt(e,u,f,a,o,s,i,d,p,c),_=u.__e,(f.ref!=u.ref||8&f.__u)&&(f.ref&&Nt(f.ref,null,u,f),u.ref&&c.push(u.ref,u.__c||_,u)),y=y||_,4&u.__u?(d=Cn(u,d,e,!f.__v),f.__e&&(f.__e=null)):typeof u.type=="function"&&g!==void 0?d=g:_&&(d=_.nextSibling),u.__u&=-21);return n.__e=y,d}function Gr(e,t,n,r,a){var o,s,i,d,p,c,h,f,u,_=n.length,y=_,g=0,$=0,b=e.__k=Array(a);for(o=0;o<a;o++)(s=t[o])!=null&&typeof s!="boolean"&&typeof s!="function"?(typeof s!="object"||s.constructor===String?s=b[o]=je(null,s):Mt(s)?s=b[o]=je(he,{children:s}):s.constructor===Le&&s.__b?s=b[o]=je(s.type,s.props,s.key,s.ref,s.__v):b[o]=s,d=o+g,s.__=e,s.__b=e.__b+1,i=null,~(p=s.__i=Yr(s,n,d,y))&&(y--,(i=n[p])&&(i.__u|=2)),i&&i.__v?(s.__u|=16,p==d-1?g--:p==d+1?g++:p!=d&&(p>d?g--:g++,$=1)):(~p||(a>_?g--:a<_&&g++),typeof s.type!="function"&&(s.__u|=4))):b[o]=null;if($){for(c=[],h=[],o=0;o<a;o++)if((s=b[o])&&16&s.__u){for(g=0,f=c.length;g<f;)c[u=g+f>>1]<s.__i?g=u+1:f=u;c[g]=s.__i,h[o]=g+1}for(g=c.length;o--;)h[o]&&(h[o]==g?g--:b[o].__u|=4)}if(y)for(o=0;o<_;o++)!(i=n[o])||2&i.__u||(i.__e==r&&(r=ie(i)),Dt(i,i));return r}function Cn(e,t,n,r){var a,o,s,i;if(typeof e.type=="function"){if(e.props.__P)return t;if(a=e.__k)for(o=0;o<a.length;o++)a[o]&&(a[o].__=e,t=Cn(a[o],t,n,!1));return t}for(t&&!t.parentNode&&(t=ie(e))&&!t.parentNode&&(t=null),s=e.__e,i=t;i&&i.nodeType==8;)i=i.nextSibling;for(s!=i&&(!r&&n.moveBefore&&s.parentNode?n.moveBefore(s,t):n.insertBefore(s,t||null)),t=s;(t=t&&t.nextSibling)&&t.nodeType==8&&!t.data.startsWith("$s"););return t}function Yr(e,t,n,r){var a,o=e.key,s=e.type,i=t[n],d=i&&!(2&i.__u);if(i===null&&o==null||d&&o==i.key&&s==i.type)return n;if(r>(d?1:0)){for(a=n-1;a>=0;a--)if((i=t[a])&&!(2&i.__u)&&o==i.key&&s==i.type)return a;for(a=n+1;a<t.length;a++)if((i=t[a])&&!(2&i.__u)&&o==i.key&&s==i.type)return a}return-1}function $n(e,t,n){n==null&&(n=""),t[0]=="-"?e.setProperty(t,n):e[t]=n}function Xe(e,t,n,r,a){var o,s;if(t=="style")if(typeof n=="string")e.style.cssText=n;else{if(typeof r=="string"&&(e.style.cssText=r=""),r)for(t in r)n&&t in n||$n(e.style,t);if(n)for(t in n)r&&n[t]==r[t]||$n(e.style,t,n[t])}else if(t[0]=="o"&&t[1]=="n")typeof n!="function"&&(n=null),typeof r!="function"&&(r=null),(e.__e||(e.__e={}))[t]=n,n&&r||(s=Et[t]||(Et[t]=Xr(t)),(e.__a||(e.__a={}))[t]=At,o=t!=(t=t.replace(wn,"$1")),(t=t.slice(2))[0]<"a"&&(t=t.toLowerCase()),n?e.addEventListener(t,s,o):e.removeEventListener(t,s,o));else{if(a=="http://www.w3.org/2000/svg")t=t.replace(/xlink(H|:h)/,"h").replace(/sName$/,"s");else if(t!="width"&&t!="height"&&t!="href"&&t!="list"&&t!="form"&&t!="tabIndex"&&t!="download"&&t!="rowSpan"&&t!="colSpan"&&t!="role"&&t!="popover"&&t in e)try{return void(e[t]=n??"")}catch{}if(typeof n=="function")return;n==null||n===!1&&t[4]!="-"?e.removeAttribute(t):e.setAttribute(t,t=="popover"&&n==1?"":n)}}function Xr(e){return function(t){var n=this.__e;if(n){if(n=n[e],t[Ze]==null)t[Ze]=At++;else if(t[Ze]<this.__a[e])return;return n(S.event?S.event(t):t)}}}function Pt(e,t,n,r,a,o,s,i,d,p){var c,h,f,u,_,y,g,$,b,v,w,k,z,we,ue,_n,ae,pe,ee=t.type;if(t.constructor!==Le)return null;128&n.__u&&(d=32&n.__u,c=n.__c.__z)&&(t.__u|=d,h=o=[],c.nodeType==8?i=Qe(c,o):o.push(c),i=o[0]||i),(c=S.__b)&&c(t);e:if(typeof ee=="function"){f=s.length;try{if($=t.props,b=(c=ee.prototype)&&c.render,v=(c=ee.contextType)&&r[c.__c],w=c?v?v.props.value:c.__:r,(u=n.__c)?(t.__c=u,2&u.__g&&(u.__g|=1)):(b?t.__c=u=new ee($,w):(t.__c=u=new xe($,w),u.constructor=ee,u.render=Qr),v&&v.sub(u),u.state||(u.state={}),u.__n=r,u.__g|=8,u.__h=[],u.__k=[]),b&&(u.__s||(u.__s=u.state),ee.getDerivedStateFromProps&&(u.__s==u.state&&(u.__s=me({},u.__s)),me(u.__s,ee.getDerivedStateFromProps($,u.__s)))),_=u.props,y=u.state,u.__v=t,n.__c){if($!==_&&b&&!ee.getDerivedStateFromProps&&u.componentWillReceiveProps&&u.componentWillReceiveProps($,w),t.__v==n.__v&&!(8&u.__g)||!(4&u.__g)&&u.shouldComponentUpdate&&u.shouldComponentUpdate($,u.__s,w)===!1){t.__v!=n.__v&&(u.props=$,u.state=u.__s,u.__g&=-9),t.__e=n.__e,t.__k=n.__k,t.__k.some(function(J){J&&(J.__=t)}),nt.push.apply(u.__h,u.__k),u.__k=[],u.__h.length&&s.push(u),i=ie(n);break e}u.componentWillUpdate&&u.componentWillUpdate($,u.__s,w),b&&u.componentDidUpdate&&u.__h.push(function(){u.componentDidUpdate(_,y,g)})}else b&&!ee.getDerivedStateFromProps&&u.componentWillMount&&u.componentWillMount(),b&&u.componentDidMount&&u.__h.push(u.componentDidMount);u.context=w,u.props=$,u.__P=e,u.__g&=-5,k=S.__r,z=b?25:0;do u.__g&=-9,k&&k(t),c=u.render(u.props,u.state=u.__s,u.context);while(8&u.__g&&++z<25);b&&(nt.push.apply(u.__h,u.__k),u.__k=[]),u.state=u.__s,u.getChildContext&&(r=me({},r,u.getChildContext())),b&&n.__c&&u.getSnapshotBeforeUpdate&&(g=u.getSnapshotBeforeUpdate(_,y)),we=c&&c.type===he&&c.key==null?c.props.children:c,$.__P&&(c=i,a=(e=$.__P).namespaceURI,d=o=null,n.props&&n.props.__P!=e&&(n.__k.some(function(J){J&&Dt(J,J)}),n.__k=null),i=n.__k?ie(n,0):null),i=Sn(e,Mt(we)?we:[we],t,n,r,a,o,s,i,d,p),$.__P&&(t.__e=null,i=c),t.__u&=-161,h&&h.some(fe),u.__h.length&&s.push(u),1&u.__g&&(u.__g&=-4)}catch(J){if(s.length=f,t.__v=null,d||o)if(J&&J.then){if(t.__u|=128|d,o){for(~(ae=o.indexOf(i||void 0))||(ae=o.length);(pe=o[ae-1])&&pe.nodeType==8;)ae--;for(;ae<o.length;ae++)if(pe=o[ae])if(o[ae]=null,ue){if(pe==_n)break}else{if(pe.nodeType!=8)break;pe.data.startsWith("$s")&&(_n=Qe(ue=pe))}}if(!ue){for(;i&&i.nodeType==8&&i.nextSibling;)i=i.nextSibling;ue=i}(c=Qe(ue=t.__c.__z||(t.__c.__z=ue)))?(t.__e=ue,i=c):t.__e=i,i=i&&i.nextSibling}else o&&o.some(fe);else t.__e=n.__e;t.__k||(t.__k=n.__k||[]),J&&J.then||En(t),S.__e(J,t,n)}}else i=t.__e=Zr(n.__e,t,n,r,a,o,s,d,p,e);return(c=S.diffed)&&c(t),i}function Qe(e,t){if(e&&e.nodeType==8&&e.data.startsWith("$s"))for(var n=1;e=e.nextSibling;){if(e.nodeType==8){if(e.data.startsWith("$s"))n++;else if(e.data.startsWith("/$s")&&!--n)return e}t&&t.push(e)}}function En(e){e&&(e.__c&&(e.__c.__g|=4),e.__k&&e.__k.some(En))}function Tn(e,t,n){for(var r=0;r<n.length;)Nt(n[r++],n[r++],n[r++]);S.__c&&S.__c(t,e),e.some(function(a){try{e=a.__h,a.__h=[],e.some(function(o){o.call(a)})}catch(o){S.__e(o,a.__v)}})}function Zr(e,t,n,r,a,o,s,i,d,p){var c,h,f,u,_,y,g,$,b=n.props||tt,v=t.props,w=t.type;if(w=="svg"?a="http://www.w3.org/2000/svg":w=="math"?a="http://www.w3.org/1998/Math/MathML":a||(a="http://www.w3.org/1999/xhtml"),o){for(c=0;c<o.length;c++)if((_=o[c])&&(w?_.localName==w:_.nodeType==3)){e=_,o[c]=null;break}}if(!e){if($=p.ownerDocument||document,!w)return $.createTextNode(v);e=$.createElementNS(a,w,v.is?v:p),i&&(S.__m&&S.__m(t,o),i=!1),o=null}if(w){if(p=w=="template"&&e.content||e,o=w=="textarea"&&v.defaultValue!=null?null:o&&Ot.call(p.childNodes),!i&&o)for(b={},c=0;c<e.attributes.length;c++)b[(_=e.attributes[c]).name]=_.value;for(c in b)_=b[c],c=="dangerouslySetInnerHTML"?f=_:c=="children"||c in v||c=="value"&&"defaultValue"in v||c=="checked"&&"defaultChecked"in v||Xe(e,c,null,_,a);for(c in v)_=v[c],c=="children"?u=_:c=="dangerouslySetInnerHTML"?h=_:c=="value"?y=_:c=="checked"?g=_:i&&typeof _!="function"||b[c]===_||Xe(e,c,_,b[c],a);h?(i||f&&(h.__html==f.__html||h.__html==e.innerHTML)||(e.innerHTML=h.__html),t.__k=[]):(f&&(e.textContent=""),(w=="foreignObject"||a=="http://www.w3.org/1998/Math/MathML"&&Kr.test(w))&&(a="http://www.w3.org/1999/xhtml"),Sn(p,Mt(u)?u:[u],t,n,r,a,o,s,o?o[0]:n.__k&&ie(n,0),i,d),o&&o.some(fe)),i&&w!="textarea"||(c="value",w=="progress"&&y==null?e.removeAttribute(c):y==null||y===e[c]&&(w!="progress"||y)||Xe(e,c,y,b[c],a),c="checked",g!=null&&g!=e[c]&&Xe(e,c,g,b[c],a))}else b===v||i&&e.data==v||(e.data=v);return e}function Nt(e,t,n,r){try{typeof e=="function"?t?t.__x=e(t)||1:r&&(r=r.__c||r.__e)&&(t=r.__x)&&(r.__x=null,typeof t=="function"?t():e(null)):e.current=t}catch(a){S.__e(a,n)}}function Dt(e,t,n){var r,a,o,s;if(S.unmount&&S.unmount(e),!(r=e.ref)||r.current&&r.current!=e.__e||Nt(r,null,t,e),r=e.__c){if(r.componentWillUnmount)try{r.componentWillUnmount()}catch(i){S.__e(i,t)}r.__P=r.__n=null}if(r=e.__k)for(s=0;s<r.length;s++)r[s]&&Dt(r[s],t,typeof e.type!="function"||n&&!e.props.__P);!n&&(r=e.__c)&&(r=r.__z)&&(a=Qe(r,o=[]))&&(r==e.__e&&o.some(fe),fe(a),fe(r)),n||fe(e.__e),e.__e=e.__c=e.__=null}function Qr(e,t,n){return this.constructor(e,n)}function An(e,t){var n,r,a,o;S.__&&S.__(e,t),t.nodeType==9&&(t=t.documentElement),r=(n=e&&32&e.__u)?null:t.__k,t.__k=je(he,{children:[e]}),a=[],o=[],Pt(t,t.__k,r||tt,tt,t.namespaceURI,r?null:t.firstChild?Ot.call(t.childNodes):null,a,r?r.__e:t.firstChild,n,o),Tn(a,t.__k,o),t.__k.props.children=null}S={__e:function(e,t,n,r){for(var a,o,s;t=t.__;)if((a=t.__c)&&!(1&a.__g)){a.__g|=4;try{if((s=(o=a.constructor)&&o.getDerivedStateFromError)&&a.setState(o.getDerivedStateFromError(e)),a.componentDidCatch&&(a.componentDidCatch(e,r||{}),s=1),s&&8&a.__g)return void(a.__g|=2)}catch(i){e=i}}throw et=0,e}},bn=0,Tt=function(e){return e!=null&&e.constructor===Le},xe.prototype.setState=function(e,t){var n=this.__s;n&&n!=this.state||(n=this.__s=me({},this.state)),typeof e=="function"&&(e=e(me({},n),this.props)),e&&(me(n,e),this.__v&&(t&&this.__k.push(t),gn(this)))},xe.prototype.forceUpdate=function(e){this.__v&&(this.__g|=4,e&&this.__h.push(e),gn(this))},xe.prototype.render=he,se=[],et=0,yn=function(e,t){return e.__v.__b-t.__v.__b},Ze=Symbol(),wn=/(PointerCapture)$|Capture$/i,At=0,Et={},Jr=0;var ke,O,Rt,Mn,It=Object.is,ot=0,qn=[],jt=[],M=S,On=M.__b,Pn=M.__r,Nn=M.diffed,Dn=M.__c,Rn=M.unmount,In=M.__;function at(e,t){M.__h&&M.__h(O,e,ot||t),ot=0;var n=O.__H||(O.__H={__:[],__h:[]});return e>=n.__.length&&n.__.push({}),n.__[e]}function m(e){return ot=1,eo(Fn,e)}function eo(e,t,n){var r=at(ke++,2);if(r.t=e,!r.__c&&(r.__=[n?n(t):Fn(void 0,t),function(o){var s=(r.__N||r.__)[0],i=r.t(s,o);It(s,i)||(r.__N=[i,r.__[1]],r.__c.setState({}))}],r.__c=O,!O.__f)){O.__f=!0;var a=O.shouldComponentUpdate;O.shouldComponentUpdate=function(o,s,i){var d=this.__H;if(!d)return!0;var p=!1,c=this.props!=o;if(d.__.some(function(f){f.__N&&(p=!0,It(f.__[0],f.__N[0])||(c=!0))}),a){var h=a.call(this,o,s,i);return p?h||c:h}return!p||c}}return r.__}function A(e,t){var n=at(ke++,3);!M.__s&&zn(n.__H,t)&&(n.__P=!0,n.__=e,n.u=t,O.__H.__h.push(n))}function D(e){return ot=5,st(function(){return{current:e}},[])}function st(e,t){var n=at(ke++,7);return zn(n.__H,t)&&(n.__=e(),n.__H=t),n.__}function qt(){var e=at(ke++,11);if(!e.__){for(var t=O.__v;!t.__m&&t.__;)t=t.__;var n=t.__m||(t.__m=[0,0]);e.__="P"+n[0]+"-"+n[1]++}return e.__}function to(){var e;do{for(;e=jt.shift();)try{qe(e)}catch(n){M.__e(n,{__:(e=e.__P)&&e.__v})}for(;e=qn.shift();){var t=e.__H;if(e.__P&&t)try{t.__h.some(qe),t.__h.some(Lt),t.__h=[]}catch(n){t.__h=[],M.__e(n,e.__v)}}}while(jt.length)}M.__b=function(e){O=null,On&&On(e)},M.__=function(e,t){e&&t.__k&&t.__k.__m&&(e.__m=t.__k.__m),In&&In(e,t)},M.__r=function(e){Pn&&Pn(e),ke=0;var t=(O=e.__c).__H;t&&(Rt==O?O.__h=[]:(t.__h.some(qe),t.__h.some(Lt),ke=0),t.__h=[],t.__.some(function(n){n.__N&&(n.__=n.__N),n.u=n.__N=void 0})),Rt=O},M.diffed=function(e){Nn&&Nn(e);var t=e.__c;t&&t.__H&&(t.__H.__h.length&&Ln(qn.push(t)),t.__H.__.some(function(n){n.u&&(n.__H=n.u)})),Rt=O=null},M.__c=function(e,t){t.some(function(n){try{n.__h.some(qe),n.__h=n.__h.filter(function(r){return!r.__||Lt(r)})}catch(r){n.__h=[function(){throw r}]}}),Dn&&Dn(e,t)},M.unmount=function(e){Rn&&Rn(e);var t,n,r=e.__c;r&&r.__H&&(r.__H.__.some(function(a){try{if(a.__P&&a.__c){if(n===void 0){for(n=e.__;n&&(!n.__c||!n.__c.__P);)n=n.__;n=n&&n.__c}a.__P=n,Ln(jt.push(a))}else qe(a)}catch(o){t=o}}),r.__H=void 0,t&&M.__e(t,r.__v))};var jn=typeof requestAnimationFrame=="function";function no(e){var t,n=function(){clearTimeout(r),jn&&cancelAnimationFrame(t),setTimeout(e)},r=setTimeout(n,35);jn&&(t=requestAnimationFrame(n))}function Ln(e){e!=1&&Mn==M.requestAnimationFrame||((Mn=M.requestAnimationFrame)||no)(to)}function qe(e){var t=O,n=e.__c;typeof n=="function"&&(e.__c=void 0,n()),O=t}function Lt(e){var t=O;e.__c=e.__(),O=t}function zn(e,t){return!e||e.length!=t.length||t.some(function(n,r){return!It(n,e[r])})}function Fn(e,t){return typeof t=="function"?t(e):t}var ro=Symbol.for("preact-signals");function dt(){if(te>1)te--;else{var e,t=!1;for((function(){var a=lt;for(lt=void 0;a!==void 0;){var o=a.S;if(o.v===a.v)for(var s=o.t;s!==void 0;s=s.x)s.i===a.i&&(s.i=o.i);a=a.o}})();Fe!==void 0;){var n=Fe;for(Fe=void 0,it++;n!==void 0;){var r=n.u;if(n.u=void 0,n.f&=-3,!(8&n.f)&&Wn(n))try{n.c()}catch(a){t||(e=a,t=!0)}n=r}}if(it=0,te--,t)throw e}}function Ft(e){if(te>0)return e();zt=++oo,te++;try{return e()}finally{dt()}}var ze,T=void 0;function Ue(e){var t=T,n=ze;T=void 0,ze=void 0;try{return e()}finally{T=t,ze=n}}var Fe=void 0,te=0,it=0,oo=0,zt=0,lt=void 0,ct=0;function Un(e){if(T!==void 0){var t=e.n;if(t===void 0||t.t!==T)return t={i:0,S:e,p:T.s,n:void 0,t:T,e:void 0,x:void 0,r:t},T.s!==void 0&&(T.s.n=t),T.s=t,e.n=t,32&T.f&&e.S(t),t;if(t.i===-1)return t.i=0,t.n!==void 0&&(t.n.p=t.p,t.p!==void 0&&(t.p.n=t.n),t.p=T.s,t.n=void 0,T.s.n=t,T.s=t),t}}function P(e,t){this.v=e,this.i=0,this.n=void 0,this.t=void 0,this.l=0,this.W=t?.watched,this.Z=t?.unwatched,this.name=t?.name}P.prototype.brand=ro;P.prototype.h=function(){return!0};P.prototype.S=function(e){var t=this,n=this.t;n!==e&&e.e===void 0&&(e.x=n,this.t=e,n!==void 0?n.e=e:Ue(function(){var r;(r=t.W)==null||r.call(t)}))};P.prototype.U=function(e){var t=this;if(this.t!==void 0){var n=e.e,r=e.x;n!==void 0&&(n.x=r,e.e=void 0),r!==void 0&&(r.e=n,e.x=void 0),e===this.t&&(this.t=r,r===void 0&&Ue(function(){var a;(a=t.Z)==null||a.call(t)}))}};P.prototype.subscribe=function(e){var t=this;return G(function(){var n=t.value;Ue(function(){return e(n)})},{name:"sub"})};P.prototype.valueOf=function(){return this.value};P.prototype.toString=function(){return this.value+""};P.prototype.toJSON=function(){return this.value};P.prototype.peek=function(){var e=this;return Ue(function(){return e.value})};Object.defineProperty(P.prototype,"value",{get:function(){var e=Un(this);return e!==void 0&&(e.i=this.i),this.v},set:function(e){if(e!==this.v){if(it>100)throw new Error("Cycle detected");(function(n){te!==0&&it===0&&n.l!==zt&&(n.l=zt,lt={S:n,v:n.v,i:n.i,o:lt})})(this),this.v=e,this.i++,ct++,te++;try{for(var t=this.t;t!==void 0;t=t.x)t.t.N()}finally{dt()}}}});function C(e,t){return new P(e,t)}function Wn(e){for(var t=e.s;t!==void 0;t=t.n)if(t.S.i!==t.i||!t.S.h()||t.S.i!==t.i)return!0;return!1}function Bn(e){for(var t=e.s;t!==void 0;t=t.n){var n=t.S.n;if(n!==void 0&&(t.r=n),t.S.n=t,t.i=-1,t.n===void 0){e.s=t;break}}}function Hn(e){for(var t=e.s,n=void 0;t!==void 0;){var r=t.p;t.i===-1?(t.S.U(t),r!==void 0&&(r.n=t.n),t.n!==void 0&&(t.n.p=r)):n=t,t.S.n=t.r,t.r!==void 0&&(t.r=void 0),t=r}e.s=n}function ve(e,t){P.call(this,void 0,t),this.x=e,this.s=void 0,this.g=ct-1,this.f=4}ve.prototype=new P;ve.prototype.h=function(){if(this.f&=-3,1&this.f)return!1;if((36&this.f)==32||(this.f&=-5,this.g===ct))return!0;if(this.g=ct,this.f|=1,this.i>0&&!Wn(this))return this.f&=-2,!0;var e=T;try{Bn(this),T=this;var t=this.x();(16&this.f||this.v!==t||this.i===0)&&(this.v=t,this.f&=-17,this.i++)}catch(n){this.v=n,this.f|=16,this.i++}return T=e,Hn(this),this.f&=-2,!0};ve.prototype.S=function(e){if(this.t===void 0){this.f|=36;for(var t=this.s;t!==void 0;t=t.n)t.S.S(t)}P.prototype.S.call(this,e)};ve.prototype.U=function(e){if(this.t!==void 0&&(P.prototype.U.call(this,e),this.t===void 0)){this.f&=-33;for(var t=this.s;t!==void 0;t=t.n)t.S.U(t)}};ve.prototype.N=function(){if(!(2&this.f)){this.f|=6;for(var e=this.t;e!==void 0;e=e.x)e.t.N()}};Object.defineProperty(ve.prototype,"value",{get:function(){if(1&this.f)throw new Error("Cycle detected");var e=Un(this);if(this.h(),e!==void 0&&(e.i=this.i),16&this.f)throw this.v;return this.v}});function _e(e,t){return new ve(e,t)}function Jn(e){var t=e.j;if(e.j=void 0,typeof t=="function"){te++;var n=T;T=void 0;try{t()}catch(r){throw e.f&=-2,e.f|=8,Ut(e),r}finally{T=n,dt()}}}function Ut(e){for(var t=e.s;t!==void 0;t=t.n)t.S.U(t);e.x=void 0,e.s=void 0,Jn(e)}function ao(e){if(T!==this)throw new Error("Out-of-order effect");Hn(this),T=e,this.f&=-2;try{8&this.f&&Ut(this)}finally{dt()}}function Se(e,t){this.x=e,this.j=void 0,this.s=void 0,this.u=void 0,this.f=32,this.name=t?.name,ze&&ze.push(this)}Se.prototype.c=function(){var e=this.S();try{if(8&this.f||this.x===void 0)return;var t=this.x();typeof t=="function"&&(this.j=t)}finally{e()}};Se.prototype.S=function(){if(1&this.f)throw new Error("Cycle detected");this.f|=1,this.f&=-9,Jn(this),Bn(this),te++;var e=T;return T=this,ao.bind(this,e)};Se.prototype.N=function(){2&this.f||(this.f|=2,this.u=Fe,Fe=this)};Se.prototype.d=function(){this.f|=8,1&this.f||Ut(this)};Se.prototype.dispose=function(){this.d()};function G(e,t){var n=new Se(e,t);try{n.c()}catch(a){throw n.d(),a}var r=n.d.bind(n);return r[Symbol.dispose]=r,r}var Kn,pt,ut,so=typeof window<"u"&&!!window.__PREACT_SIGNALS_DEVTOOLS__;var Vn=[];G(function(){Kn=this.N})();function Ce(e,t){S[e]=t.bind(null,S[e]||function(){})}function We(e){if(ut){var t=ut;ut=void 0,t()}ut=e&&e.S()}function Gn(e){var t=this,n=e.data,r=lo(n);r.name="ReactiveDom",r.value=n;var a=st(function(){for(var i=t,d=t.__v;d=d.__;)if(d.__c){d.__c.__$f|=4;break}var p=_e(function(){var u=r.value.value;return u===0?0:u===!0?"":u||""}),c=_e(function(){return!Array.isArray(p.value)&&!Tt(p.value)}),h=G(function(){if(this.N=Yn,c.value){var u=p.value;i.__v&&i.__v.__e&&i.__v.__e.nodeType===3&&(i.__v.__e.data=u)}}),f=t.__$u.d;return t.__$u.d=function(){h(),f.call(this)},[c,p]},[]),o=a[0],s=a[1];return o.value?s.peek():s.value}Gn.displayName="ReactiveTextNode";Object.defineProperties(P.prototype,{constructor:{configurable:!0,value:rt(he,null).constructor},type:{configurable:!0,value:Gn},props:{configurable:!0,get:function(){var e=this;return{data:{get value(){return e.value}}}}},__b:{configurable:!0,value:1}});Ce("__b",function(e,t){if(We(),pt=void 0,typeof t.type=="string"){var n,r=t.props;for(var a in r)if(a!=="children"){var o=r[a];o instanceof P&&(n||(t.__np=n={}),n[a]=o,r[a]=o.peek())}}e(t)});Ce("__r",function(e,t){if(e(t),t.type!==he){We();var n,r=t.__c;r&&(r.__$f&=-2,(n=r.__$u)===void 0&&(r.__$u=n=(function(a,o){var s;return G(function(){s=this},{name:o}),s.c=a,s})((function(a){return function(){var o;so&&((o=this.y)==null||o.call(this)),a.__$f|=1,a.setState({})}})(r),typeof t.type=="function"?t.type.displayName||t.type.name:""))),pt=r,We(n)}});Ce("__e",function(e,t,n,r){We(),pt=void 0,e(t,n,r)});Ce("diffed",function(e,t){We(),pt=void 0;var n;if(typeof t.type=="string"&&(n=t.__e)){var r=t.__np,a=t.props,o=n.U;if(o)for(var s in o){var i=o[s];i===void 0||r&&s in r||(i.d(),o[s]=void 0)}if(r){o||(o={},n.U=o);for(var d in r){var p=o[d],c=r[d];p===void 0?(p=io(n,d,c,a),o[d]=p):p.o(c,a)}}}e(t)});function io(e,t,n,r){var a=t in e&&e.ownerSVGElement===void 0,o=C(n);return{o:function(s,i){o.value=s,r=i},d:G(function(){this.N=Yn;var s=o.value.value;r[t]!==s&&(r[t]=s,a?e[t]=s:s!=null&&(s!==!1||t[4]==="-")?e.setAttribute(t,s):e.removeAttribute(t))})}}Ce("unmount",function(e,t){if(typeof t.type=="string"){var n=t.__e;if(n){var r=n.U;if(r){n.U=void 0;for(var a in r){var o=r[a];o&&o.d()}}}var s=t.__np;if(s){var i=t.props;for(var d in s)i[d]=s[d]}t.__np=void 0}else{var p=t.__c;if(p){p.__$f|=8;var c=p.__$u;c&&(p.__$u=void 0,c.d())}}e(t)});Ce("__h",function(e,t,n,r){r<3&&(t.__$f|=2),e(t,n,r)});xe.prototype.shouldComponentUpdate=function(e,t){if(this.__R)return!0;var n=this.__$u,r=n&&n.s!==void 0;for(var a in t)return!0;if(this.__f||typeof this.u=="boolean"&&this.u===!0){var o=2&this.__$f;if(!(r||o||4&this.__$f)||1&this.__$f)return!0}else if(!(r||4&this.__$f)||3&this.__$f)return!0;for(var s in e)if(s!=="__source"&&e[s]!==this.props[s])return!0;for(var i in this.props)if(!(i in e))return!0;return!1};function lo(e,t){return st(function(){return C(e,t)},[])}var co=function(e){queueMicrotask(function(){queueMicrotask(e)})};function uo(){Ft(function(){for(var e;e=Vn.shift();)Kn.call(e)})}function Yn(){Vn.push(this)===1&&(S.requestAnimationFrame||co)(uo)}var Zn=function(e,t,n,r){var a;t[0]=0;for(var o=1;o<t.length;o++){var s=t[o++],i=t[o]?(t[0]|=s?1:2,n[t[o++]]):t[++o];s===3?r[0]=i:s===4?r[1]=Object.assign(r[1]||{},i):s===5?(r[1]=r[1]||{})[t[++o]]=i:s===6?r[1][t[++o]]+=i+"":s?(a=e.apply(i,Zn(e,i,n,["",null])),r.push(a),i[0]?t[0]|=2:(t[o-2]=0,t[o]=a)):r.push(i)}return r},Xn=new Map;function Qn(e){var t=Xn.get(this);return t||(t=new Map,Xn.set(this,t)),(t=Zn(this,t.get(e)||(t.set(e,t=(function(n){for(var r,a,o=1,s="",i="",d=[0],p=function(f){o===1&&(f||(s=s.replace(/^\s*\n\s*|\s*\n\s*$/g,"")))?d.push(0,f,s):o===3&&(f||s)?(d.push(3,f,s),o=2):o===2&&s==="..."&&f?d.push(4,f,0):o===2&&s&&!f?d.push(5,0,!0,s):o>=5&&((s||!f&&o===5)&&(d.push(o,0,s,a),o=6),f&&(d.push(o,f,0,a),o=6)),s=""},c=0;c<n.length;c++){c&&(o===1&&p(),p(c));for(var h=0;h<n[c].length;h++)r=n[c][h],o===1?r==="<"?(p(),d=[d],o=3):s+=r:o===4?s==="--"&&r===">"?(o=1,s=""):s=r+s[0]:i?r===i?i="":s+=r:r==='"'||r==="'"?i=r:r===">"?(p(),o=1):o&&(r==="="?(o=5,a=s,s=""):r==="/"&&(o<5||n[c][h+1]===">")?(p(),o===3&&(d=d[0]),o=d,(d=d[0]).push(2,0,o),o=0):r===" "||r==="	"||r===`
`||r==="\r"?(p(),o=2):s+=r),o===3&&s==="!--"&&(o=4,d=d[0])}return p(),d})(e)),t),arguments,[])).length>1?t:t[0]}var l=Qn.bind(rt);async function*er(e){let t=e.body.pipeThrough(new TextDecoderStream).getReader(),n="";try{for(;;){let{done:r,value:a}=await t.read();if(r)return;n+=a;let o=n.split(`

`);n=o.pop();for(let s of o){let i=s.split(`
`).filter(d=>d.startsWith("data:")).map(d=>d.slice(5).trim());if(i.length){if(i[0]==="[DONE]")return;yield JSON.parse(i.join(`
`))}}}}finally{t.cancel().catch(()=>{})}}var Wt="loramux.key",tr=2e4,L=C(sessionStorage.getItem(Wt)??""),Z=C(""),ge=C(!0),$e=C(0),H=class extends Error{constructor(t,{status:n=0,code:r="",param:a="",faults:o=[]}={}){super(t),Object.assign(this,{status:n,code:r,param:a,faults:o})}};function Bt(e){L.value=e,Z.value="",e?sessionStorage.setItem(Wt,e):sessionStorage.removeItem(Wt)}function nr(){sessionStorage.clear(),location.reload()}function rr(e={}){return L.value?{...e,Authorization:`Bearer ${L.value}`}:e}async function Ee(e,t,{body:n,signal:r,headers:a}={}){let o;try{o=await fetch(t,{method:e,signal:r,headers:rr(n===void 0?a:{"Content-Type":"application/json",...a}),body:n===void 0?void 0:JSON.stringify(n)})}catch(s){throw s.name==="AbortError"?s:(mt(),new H("The server cannot be reached.",{code:"unreachable"}))}if(!o.ok)throw ar(o.status,await o.text());return o}async function R(e,t){return JSON.parse(await Ht(e,t))}async function Ht(e,t){let n=new AbortController,r=setTimeout(()=>n.abort(),tr);try{return await(await Ee("GET",e,{...t,signal:n.signal})).text()}catch(a){throw a instanceof H?a:(mt(),new H("The server does not answer.",{code:"unreachable"}))}finally{clearTimeout(r)}}var U=async(e,t={},n)=>(await Ee("POST",e,{...n,body:t})).json(),or=async(e,t)=>(await Ee("PATCH",e,{body:t})).json(),Te=async e=>(await Ee("DELETE",e)).json();async function*Ae(e,t,n){let r=await Ee(e,t,n);try{for await(let a of er(r)){if(a.error?.message&&a.object===void 0)throw new H(a.error.message,a.error);yield a}}catch(a){throw a instanceof H||a.name==="AbortError"?a:(mt(),new H("The connection broke before the answer was complete.",{code:"unreachable"}))}}function ft(e,t,{onProgress:n=()=>{},signal:r}={}){return new Promise((a,o)=>{let s=new XMLHttpRequest;s.open("POST",e);for(let[d,p]of Object.entries(rr()))s.setRequestHeader(d,p);s.upload.onprogress=d=>d.lengthComputable&&n(d.loaded/d.total),s.upload.onload=()=>n(1);let i=d=>d.preventDefault();addEventListener("beforeunload",i),s.onloadend=()=>removeEventListener("beforeunload",i),s.onload=()=>{s.status<300?a(JSON.parse(s.responseText)):o(ar(s.status,s.responseText))},s.onerror=()=>{mt(),o(new H("The upload broke off: the server cannot be reached.",{code:"unreachable"}))},s.onabort=()=>o(new DOMException("stopped","AbortError")),r?.addEventListener("abort",()=>s.abort()),s.send(t)})}async function Me(e,t){let n=document.createElement("a");n.download=t,L.value?n.href=URL.createObjectURL(await(await Ee("GET",e)).blob()):n.href=e,n.click(),L.value&&setTimeout(()=>URL.revokeObjectURL(n.href),6e4)}function ar(e,t){let n={};try{n=JSON.parse(t).error??{}}catch{}let r=n.message??`The server answered with status ${e}.`;if(e===401){let a=L.value?r:Z.value||"Enter the one that its operator has given to you.";Bt(""),Z.value=a}return new H(r,{...n,status:e})}async function mt(){if(ge.value){ge.value=!1;for(let e=500;!ge.value;e=Math.min(5e3,e*1.5)){await new Promise(t=>setTimeout(t,e));try{await fetch("/health",{cache:"no-store",signal:AbortSignal.timeout(tr)}),ge.value=!0,$e.value+=1}catch{}}}}function W(e,t,n=[]){let r=D(e);r.current=e;let a=D(()=>{});return A(()=>{let o,s=!0,i=!1,d=async()=>{clearTimeout(o),!i&&(i=!0,document.hidden||await r.current(()=>s).catch(()=>{}),i=!1,s&&(o=setTimeout(d,t*1e3)))};return a.current=d,d(),document.addEventListener("visibilitychange",d),()=>{s=!1,clearTimeout(o),document.removeEventListener("visibilitychange",d)}},[t,$e.value,...n]),()=>a.current()}var Jt="loramux.theme";function sr(){let[e,t=""]=location.hash.replace(/^#\/?/,"").split("?"),[n,...r]=e.split("/");return{view:n||"compare",rest:r.map(decodeURIComponent).join("/"),query:new URLSearchParams(t)}}var K=C(sr());addEventListener("hashchange",()=>K.value=sr());var be=C(localStorage.getItem(Jt)??"");G(()=>{be.value?document.documentElement.dataset.theme=be.value:delete document.documentElement.dataset.theme});var ir=matchMedia("(prefers-color-scheme: dark)"),Kt=C(ir.matches);ir.addEventListener("change",e=>Kt.value=e.matches);var He=_e(()=>be.value?be.value==="dark":Kt.value);function lr(){let e=He.value?"light":"dark";be.value=e===(Kt.value?"dark":"light")?"":e,be.value?localStorage.setItem(Jt,be.value):localStorage.removeItem(Jt)}var Y=C(null),B=_e(()=>Y.value?.find(e=>!e.parent)??null),Be=C(null);async function ht(){try{let e=(await R("/v1/models")).data;JSON.stringify(e)!==JSON.stringify(Y.value)&&(Y.value=e),Be.value=null}catch(e){Be.value=e}}function x({error:e,title:t}){if(!e)return null;let[n,...r]=po(e);return l`<div class="problem" role="alert">
${t&&l`<strong>${t}</strong>`}
<p>${n}</p>
${r.length>0&&l`<ul>
${r.map(a=>l`<li>${a}</li>`)}
</ul>`}
</div>`}function po({message:e,faults:t}){return t?.length?[e.split(": ")[0],...t.map(({where:n,problem:r})=>`${n}: ${r}`)]:e.split(/(?:;|\.) (?=Line \d+,|and \d+ more lines)/)}function Oe({title:e,children:t}){return l`<div class="empty"><h3>${e}</h3>${t}</div>`}function N({label:e,hint:t,children:n,wide:r}){return l`<label class=${r?"field wide":"field"}>
<span class="label">${e}</span>${n}${t&&l`<span class="hint">${t}</span>`}
</label>`}function ne({label:e,checked:t,onChange:n,hint:r}){return l`<label class="check" title=${r}>
<input type="checkbox" checked=${t} onChange=${a=>n(a.target.checked)} /> ${e}
</label>`}function le({value:e,label:t}){return l`<progress max="1" value=${e??void 0} aria-label=${t}></progress>`}function vt({value:e,onChange:t,label:n}){let r=Y.value??[],a=r.some(o=>o.id===e);return l`<select aria-label=${n} value=${e} onChange=${o=>t(o.target.value)}>
${!a&&e&&l`<option value=${e}>${e} (not here)</option>`}
${r.map(o=>l`<option value=${o.id}>${o.id}${o.parent?"":" (base)"}</option>`)}
</select>`}function Pe({text:e,label:t,title:n}){let[r,a]=m("");return l`<button class="quiet" type="button" title=${n} onClick=${async()=>{try{await navigator.clipboard.writeText(e()),a("Copied")}catch{a("The browser did not allow it")}setTimeout(()=>a(""),1600)}}>
<span aria-live="polite">${r||t}</span>
</button>`}function _t({title:e,onClose:t,children:n}){let r=D(),a=qt();return A(()=>{r.current.showModal()},[]),l`<dialog ref=${r} aria-labelledby=${a} onClose=${t}>
<h2 id=${a}>${e}</h2>
${n}
</dialog>`}function Ne({title:e,verb:t,act:n,onClose:r,children:a}){let[o,s]=m(null),[i,d]=m(!1);return l`<${_t} title=${e} onClose=${r}>
${a}
<${x} error=${o} />
<div class="row end">
<button type="button" onClick=${r}>Cancel</button>
<button type="button" class="danger" disabled=${i} onClick=${async()=>{d(!0);try{await n(),r()}catch(c){s(c),d(!1)}}}>${t}</button>
</div>
<//>`}function gt({label:e,accept:t,multiple:n=!1,onFiles:r,children:a}){let[o,s]=m(!1),i=qt();return l`<div
class=${o?"drop over":"drop"}
onDragOver=${c=>(c.preventDefault(),s(!0))}
onDragLeave=${()=>s(!1)}
onDrop=${c=>{c.preventDefault(),s(!1),c.dataTransfer.files.length&&r([...c.dataTransfer.files])}}
>
<strong>${e}</strong>
<input
id=${i}
class="hidden"
type="file"
accept=${t}
multiple=${n}
onChange=${c=>{c.target.files.length&&r([...c.target.files]),c.target.value=""}}
/>
<label class="button" for=${i}>${n?"Choose files":"Choose a file"}<span class="hidden">: ${e}</span></label>
${a}
</div>`}var $t=({page:e,count:t,onMore:n})=>e?.has_more&&t<1e3?l`<button type="button" onClick=${n}>Show older</button>`:null,F=({kind:e="",children:t})=>l`<span class=${`chip ${e}`}>${t}</span>`;function bt(e){let t=String.fromCharCode(...new TextEncoder().encode(JSON.stringify(e)));return btoa(t).replaceAll("+","-").replaceAll("/","_").replace(/=+$/,"")}function Vt(e){try{let t=atob(e.replaceAll("-","+").replaceAll("_","/"));return JSON.parse(new TextDecoder().decode(Uint8Array.from(t,n=>n.charCodeAt(0))))}catch{return null}}var cr="loramux.compare",yt=4,Xt={temperature:.7,top_p:1,max_tokens:128,seed:42},dr={mode:"chat",system:"",prompt:"",sampling:Xt},V=C({...dr}),I=C([]),fo=0;function Gt(e){return{id:++fo,model:C(e),turns:C([]),status:C("idle"),error:C(null),figures:C(null),abort:null}}function Je(e){if(e.mode&&e.mode!==V.value.mode)for(let t of I.value)ce(t),t.turns.value=[],t.figures.value=null;V.value={...V.value,...e},Ke()}function ur(e,t){e.model.value=t,Ke()}function pr(e){I.value.length<yt&&(I.value=[...I.value,Gt(e)]),Ke()}function fr(e){ce(e),I.value=I.value.filter(t=>t!==e),Ke()}var mr=()=>({...V.value,models:I.value.map(e=>e.model.value)});function hr(e,t){let n=e.get("s"),r=n?Vt(n):I.value.length?null:Vt(sessionStorage.getItem(cr)??"");if(r&&Array.isArray(r.models)&&(V.value={mode:r.mode==="text"?"text":"chat",system:String(r.system??""),prompt:String(r.prompt??""),sampling:{...Xt,...mo(r.sampling)}},I.value.forEach(ce),I.value=r.models.slice(0,yt).map(a=>Gt(String(a))),Ke(),n&&history.replaceState(null,"","#/compare")),!I.value.length){let a=t.filter(s=>s.parent&&!s.id.includes(":")),o=t.find(s=>!s.parent);I.value=[o,...a.slice(0,1)].filter(Boolean).map(s=>Gt(s.id))}}var mo=e=>Object.fromEntries(Object.entries(e??{}).filter(([t,n])=>t in Xt&&(n===null||typeof n=="number"))),Ke=()=>sessionStorage.setItem(cr,bt(mr())),vr=()=>`${location.origin}/#/compare?s=${bt(mr())}`,De=(e,t="")=>`#/compare?s=${bt({...dr,prompt:t,models:e})}`;function Zt(e,t){let{mode:n,system:r,sampling:a}=V.value,o=Object.fromEntries(Object.entries(a).filter(([,i])=>i!==null));if(n==="text")return["/v1/completions",{model:e.model.value,prompt:t[0]?.content??"",...o}];let s=[...r.trim()?[{role:"system",content:r}]:[],...t];return["/v1/chat/completions",{model:e.model.value,messages:s,...o}]}function Qt(){for(let e of I.value)ce(e),e.turns.value=[],e.figures.value=null,en(e,V.value.prompt)}function ce(e){e.abort?.abort()}async function en(e,t){ce(e);let n=e.abort=new AbortController,r=V.value.mode==="text",a=e.turns.value,o=r?[{role:"text",content:(a[0]?.content??"")+t}]:[...a,{role:"user",content:t}],[s,i]=Zt(e,o);e.error.value=null,e.status.value="waiting",e.turns.value=r?o:[...o,{role:"assistant",content:""}];let d=new Yt(e),p=ho(e,o,r);try{let c={body:{...i,stream:!0,stream_options:{include_usage:!0,continuous_usage_stats:!0}},signal:n.signal};for await(let h of Ae("POST",s,c)){let f=h.choices[0],u=r?f?.text:f?.delta.content;d.saw(h.usage,!!u,f?.finish_reason),u&&p(u)}e.status.value="done"}catch(c){if(n!==e.abort)return;e.status.value=c.name==="AbortError"?"stopped":"error",c.name!=="AbortError"&&(e.error.value=c instanceof H?c:new H(String(c.message)))}finally{p("",!0),n===e.abort&&(e.abort=null)}}function ho(e,t,n){let r="",a=0,o=()=>{a=0,e.turns.value=n?[{role:"text",content:t[0].content+r,from:t[0].content.length}]:[...t,{role:"assistant",content:r}]};return(s,i=!1)=>{r+=s,i?(cancelAnimationFrame(a),(r||!n)&&o()):a||=requestAnimationFrame(o)}}var Yt=class{constructor(t){this.column=t,this.began=performance.now(),this.first=null,this.figures={ttft:null,tokens:0,rate:null,finish:null}}saw(t,n,r){let a=performance.now();n&&this.first===null&&(this.first=a,this.column.status.value="streaming",this.figures.ttft=(a-this.began)/1e3),t&&(this.figures.tokens=t.completion_tokens),r&&(this.figures.finish=r);let o=(a-(this.first??a))/1e3;this.figures.tokens>1&&o>.05&&(this.figures.rate=(this.figures.tokens-1)/o),this.column.figures.value={...this.figures}}};var _r=["B","kB","MB","GB","TB"];function j(e){if(e==null)return"–";let t=0;for(;e>=1e3&&t<_r.length-1;)e/=1e3,t+=1;return`${e.toFixed(t&&e<100?1:0)} ${_r[t]}`}function E(e,t=3){return e==null||!Number.isFinite(e)?"–":e!==0&&Math.abs(e)<.001?e.toExponential(1):e.toLocaleString("en",{maximumSignificantDigits:Math.abs(e)>=1e3?12:t})}function Q(e){return e==null||!Number.isFinite(e)?"–":e<1?`${Math.round(e*1e3)} ms`:e<60?`${e.toFixed(e<10?1:0)} s`:(e=Math.round(e),e<3600?`${Math.floor(e/60)} min ${e%60} s`:`${Math.floor(e/3600)} h ${Math.floor(e%3600/60)} min`)}function X(e,t=Date.now()/1e3){if(e==null)return"–";let n=Math.max(0,t-e);return n<5?"now":n<60?`${Math.floor(n)} s ago`:n<3600?`${Math.floor(n/60)} min ago`:n<86400?`${Math.floor(n/3600)} h ago`:tn(e)}var tn=e=>new Date(e*1e3).toLocaleDateString(),Re=e=>new Date(e*1e3).toLocaleTimeString([],{hour12:!1}),ye=(e,t)=>`${e.toLocaleString("en")} ${t}${e===1?"":"s"}`;var vo={ok:"It changes the base's answers, and does exactly what PEFT does with the same weights.",noop:"It changes nothing.",disagrees:"It is served otherwise than PEFT computes it.",not_finite:"It produces numbers that are not finite.",skipped:"It was uploaded without verification."};function gr({adapter:e}){let[t,n]=m(null),[r,a]=m(null);A(()=>{let i=!0;return R(Ve(e.id)).then(d=>i&&n(d),d=>i&&a(d)),()=>i=!1},[e.id,e.generation]);let o=t?.verification,s=o?.report;return l`<div class="block">
<h3>Verification</h3>
<${x} error=${r} />
${t&&!o&&l`<p class="muted">Nobody asked for one: adapters from folders and checkpoints are not verified.</p>`}
${o&&l`<p>${vo[o.verdict]} ${s&&l`<span class="muted">Checked at ${Re(o.checked_at)}.</span>`}</p>`}
${s&&l`<${_o} report=${s} />`}
${t&&l`<dl class="facts">
<dt>Source</dt><dd>${t.source}${t.origin&&` (${t.origin})`}</dd>
<dt>Base in its config</dt><dd>${t.base_model??"not named"}</dd>
<dt>Stored as</dt><dd>${t.dtype??"–"}</dd>
${t.description&&l`<dt>Description</dt><dd>${t.description}</dd>`}
</dl>`}
</div>`}function _o({report:e}){let{shift:t,peft:n}=e,r=go(e.weights.modules),a=Math.max(...r.map(([,o])=>o),1e-12);return l`<div class="block">
<dl class="facts">
${t&&l`<dt>Other next token than the base</dt><dd>${E(t.top1_changed*100)} % of ${t.positions} positions</dd>
<dt>KL from the base</dt><dd>${E(t.kl)} nats</dd>`}
${n&&l`<dt>Same next token as PEFT</dt><dd>${E(n.top1_agreement*100)} %</dd>
<dt>Error against PEFT</dt><dd>${E(n.relative_error)} of at most ${E(n.relative_bound)}</dd>`}
</dl>
${e.warnings.map(o=>l`<p class="note">${o}</p>`)}
<h4>Size of the update, by layer <span class="muted">‖ΔW‖ / ‖W‖</span></h4>
<ul class="bars">
${r.map(([o,s])=>l`<li>
<span>${o}</span><span class="track"><span style=${{width:`${100*s/a}%`}}></span></span><span class="n">${E(s)}</span>
</li>`)}
</ul>
</div>`}function go(e){let t=new Map;for(let{name:n,delta_norm:r,weight_norm:a}of e){let o=/\.(\d+)\./.exec(n)?.[1]??n,[s,i]=t.get(o)??[0,0];t.set(o,[s+r**2,i+a**2])}return[...t].map(([n,[r,a]])=>[n,Math.sqrt(r/(a||1))]).sort((n,r)=>n[0]-r[0])}var nn="adapter_config.json",rn="adapter_model.safetensors",on=/\.(zip|tar|tar\.gz|tgz|tar\.zst)$/i,$r={overwrite:!1,pinned:!1,verify:!0};function br({onDone:e}){let[t,n]=m([]),[r,a]=m(""),[o,s]=m($r),[i,d]=m(null),[p,c]=m(null),[h,f]=m(""),u=D(null),_=v=>{c(null),f("");let w=[...v,...t.filter(z=>!v.some(we=>we.name===z.name))];n(w);let k=w.find(z=>on.test(z.name));k&&!r&&a(k.name.replace(on,"").replace(/[^A-Za-z0-9._-]+/g,"-"))},[y,g]=$o(t),$=()=>{n([]),a(""),s($r),c(null)};return l`<form class="panel upload" onSubmit=${async v=>{v.preventDefault(),c(null),d(0),u.current=new AbortController;let w=new FormData;for(let[k,z]of Object.entries({name:r,...o}))w.append(k,String(z));for(let[k,z]of y)w.append(k,z);try{let k=await ft("/v1/adapters",w,{onProgress:d,signal:u.current.signal});$(),f([`${k.id} is ready to be called.`,...k.warnings??[]].join(" ")),e()}catch(k){k.name!=="AbortError"&&c(k)}finally{d(null)}}}>
<${gt} label="Drop an adapter here" multiple accept=".json,.safetensors,.zip,.tar,.gz,.tgz,.zst" onFiles=${_}>
<p class="muted">${nn} and ${rn}, or one archive of them (.zip, .tar, .tar.gz, .tar.zst).</p>
<//>
${t.length>0&&l`<ul class="files">${t.map(v=>l`<li>${v.name} <span class="muted">${j(v.size)}</span></li>`)}</ul>
${g&&l`<p class="note">${g}</p>`}
<div class="row wrap bottom">
<${N} label="Name"><input
type="text"
required
value=${r}
placeholder="support-bot"
onInput=${v=>a(v.target.value)}
/><//>
<${ne}
label="Replace if the name is taken"
checked=${o.overwrite}
onChange=${v=>s({...o,overwrite:v})}
/>
<${ne}
label="Pin to the device"
checked=${o.pinned}
onChange=${v=>s({...o,pinned:v})}
/>
<${ne}
label="Verify against PEFT"
checked=${o.verify}
onChange=${v=>s({...o,verify:v})}
/>
<span class="grow"></span>
<button type="button" onClick=${()=>i===null?$():u.current.abort()}>Cancel</button>
<button class="primary" disabled=${i!==null||g||!r}>Upload</button>
</div>`}
${i!==null&&l`<div class="progress" role="status">
<${le} label="Upload" value=${i<1?i:void 0} />
${i<1?`Sending, ${Math.round(i*100)} %`:o.verify?"Checking the files and verifying against PEFT…":"Checking the files…"}
</div>`}
<${x} error=${p} title="The adapter was not taken" />
<p class="said" role="status">${h}</p>
</form>`}function $o(e){let t=e.filter(o=>on.test(o.name));if(t.length)return[[["archive",t[0]]],e.length>1?"An archive comes alone: cancel and drop it again.":""];let n=e.find(o=>o.name.endsWith(".json")),r=e.find(o=>o.name.endsWith(".safetensors")),a=n&&r?"":`${n?rn:nn} is missing: drop it, too.`;return[[[nn,n],[rn,r]].filter(([,o])=>o),a]}var wr={bf16:"bf16",fp16:"fp16",fp32:"fp32",nf4:"NF4 (4 bit)"},yr=20,bo={succeeded:"good",failed:"bad",running:"busy"};function xr({adapter:e}){let t=`${Ve(e.id)}/exports`,[n,r]=m(null),[a,o]=m(yr),[s,i]=m("bf16"),[d,p]=m("dequantized"),[c,h]=m(8),[f,u]=m(null),_=W(async g=>{let $=await R(`${t}?limit=${a}`);g()&&r($)},3,[t,a]);return l`<div class="block">
<h3>Export</h3>
<p class="muted">The base and this adapter merged into one checkpoint, proven to answer as it is served here.</p>
<form class="row wrap bottom" onSubmit=${async g=>{g.preventDefault(),u(null);try{await U(t,{format:s,onto:d,verify:c}),_()}catch($){u($)}}}>
<label class="field"><span class="label">Format</span>
<select value=${s} onChange=${g=>i(g.target.value)}>
${Object.entries(wr).map(([g,$])=>l`<option value=${g}>${$}</option>`)}
</select>
</label>
<label class="field"><span class="label">Merged onto</span>
<select value=${d} onChange=${g=>p(g.target.value)}>
<option value="dequantized">the weights as served</option>
<option value="original">the original weights</option>
</select>
</label>
<label class="field"><span class="label">Prompts to prove it on</span>
<input
type="number"
min="0"
max="8"
required
value=${c}
onInput=${g=>h(g.target.valueAsNumber)}
/>
</label>
<button>Start export</button>
</form>
<${x} error=${f} />
${n?.data.map(g=>l`<${yo} key=${g.id} job=${g} path=${`${t}/${g.id}`} onChanged=${_} />`)}
<${$t} page=${n} count=${a} onMore=${()=>o(a+yr)} />
</div>`}function yo({job:e,path:t,onChanged:n}){let[r,a]=m(null),[o,s]=m(null),i=["queued","running"].includes(e.status);A(()=>{if(!i)return;let c=new AbortController;return wo(t,c.signal,a).then(n,()=>{}),()=>c.abort()},[t,i]);let d=c=>async()=>{try{await c(),n()}catch(h){s(h)}},p=r??e.progress;return l`<div class="job" data-export=${e.id}>
<div class="row spread">
<span><${F} kind=${bo[e.status]}>${e.status}<//> ${wr[e.format]}, ${X(e.created)}${e.bytes?`, ${j(e.bytes)}`:""}</span>
<span class="row">
${e.status==="succeeded"&&l`<button
type="button"
onClick=${d(()=>Me(`${t}/download`,`${e.adapter.replaceAll("/","-")}-${e.format}.tar`))}
>Download</button>`}
${i&&l`<button type="button" onClick=${d(()=>U(`${t}/cancel`))}>Cancel</button>`}
${!i&&l`<button type="button" class="quiet" onClick=${d(()=>Te(t))}>Remove</button>`}
</span>
</div>
${i&&l`<div class="progress" role="status">
<${le} label="Export" value=${p.fraction} />
${p.phase}, ${E(p.fraction*100)} %${p.eta_seconds?`, about ${Q(p.eta_seconds)} left`:""}
</div>`}
<${x} error=${e.error??o} />
</div>`}async function wo(e,t,n){for await(let r of Ae("GET",`${e}/events?stream=true`,{signal:t}))r.object==="adapter.export.progress"&&n(r)}var Ve=e=>`/v1/adapters/${e.split("/").map(encodeURIComponent).join("/")}`,xo=["Name","State","Generation","Rank","Targets","Size","Tier","Requests","Last used"],ko=new Set(["Rank","Size","Requests"]),So=200,an=null;async function Co(){let e=[];for(let t="";;){let n=await R(`/v1/adapters?limit=${So}${t&&`&after=${encodeURIComponent(t)}`}`);if(e.push(...n.data),!n.has_more)return e;t=n.last_id}}function kr(){let[e,t]=m(an),[n,r]=m(null),[a,o]=m(""),s=K.value.rest,i=W(async c=>{try{an=await Co(),c()&&(t(an),r(null))}catch(h){c()&&r(h)}},2),d=()=>{i(),ht()},p=e?.filter(c=>c.id.toLowerCase().includes(a.toLowerCase()));return l`<section>
<h1 class="hidden">Adapters</h1>
<${br} onDone=${d} />
<${x} error=${e?null:n} />
${!e&&!n&&l`<p class="muted">Asking the server…</p>`}
${e?.length===0&&l`<${Oe} title="No adapters yet"
>Upload one above, or train one under <a href="#/train">Train</a>. The base answers without any.<//
>`}
${e?.length>8&&l`<input
class="filter"
type="search"
aria-label="Filter by name"
placeholder="Filter by name"
value=${a}
onInput=${c=>o(c.target.value)}
/>`}
${p?.length>0&&l`<div class="panel scroll" tabindex="0" role="region" aria-label="Table of adapters">
<table class="adapters">
<thead>
<tr>
${xo.map(c=>l`<th scope="col" class=${ko.has(c)?"n":""}>${c}</th>`)}
<th scope="col"><span class="hidden">Actions</span></th>
</tr>
</thead>
<tbody>
${p.map(c=>l`<${To}
key=${c.id}
adapter=${c}
isOpen=${s===c.id}
onChanged=${d}
/>`)}
</tbody>
</table>
</div>`}
${s&&e&&!e.some(({id:c})=>c===s)&&l`<p class="note" role="status">There is no adapter ${s} here any more.</p>`}
${p?.length===0&&e.length>0&&l`<p class="muted">No adapter's name has “${a}” in it.</p>`}
</section>`}var Eo={ready:"good",failed:"bad",loading:"busy",available:""};function To({adapter:e,isOpen:t,onChanged:n}){let{id:r}=e,a=e.target_modules?.map(o=>o.replace(/_proj$/,"")).join(" ")??"–";return l`<tr class=${t?"open":""} data-adapter=${r}>
<th scope="row">
<a href=${t?"#/adapters":`#/adapters/${encodeURIComponent(r)}`} aria-expanded=${t}>${r}</a>
${e.pinned&&l`<${F}>pinned<//>`}
${e.verification?.verdict&&!["ok","skipped"].includes(e.verification.verdict)&&l`<${F} kind="bad">${e.verification.verdict}<//>`}
</th>
<td><${F} kind=${Eo[e.state]}>${e.state}<//></td>
<td><code title=${e.generation}>${e.generation.slice(0,8)}</code></td>
<td class="n" data-label="rank">${e.rank??"–"}</td>
<td class="targets" title=${e.target_modules?.join(", ")}>${a}</td>
<td class="n">${j(e.bytes)}</td>
<td>${e.tier}</td>
<td class="n" data-label="requests" title="running now / since the server started">${e.in_flight?`${e.in_flight} / `:""}${e.requests}</td>
<td>${e.last_used?X(e.last_used):"not yet"}</td>
<td class="actions"><div class="row end">
<a class="button" href=${De([B.value?.id,r].filter(Boolean))}>Compare</a>
<a
class="button"
href=${t?"#/adapters":`#/adapters/${encodeURIComponent(r)}`}
aria-label=${`${t?"Close":"Manage"} ${r}`}
>${t?"Close":"Manage"}</a>
</div></td>
</tr>
${t&&l`<tr class="detail">
<td colspan="10"><${Ao} adapter=${e} onChanged=${n} /></td>
</tr>`}`}function Ao({adapter:e,onChanged:t}){let[n,r]=m(null),[a,o]=m(""),s=Ve(e.id),i=e.generations.filter(f=>f.generation!==e.generation),[d,p]=m(""),c=async f=>{r(null);try{await f(),t()}catch(u){r(u)}},h=async()=>{await Te(s),location.hash="#/adapters",t()};return l`<div class="manage">
<${x} error=${e.failure&&{message:e.failure}} />
<${x} error=${n} />
<div class="row wrap">
<button
type="button"
onClick=${()=>c(()=>or(s,{pinned:!e.pinned}))}
>${e.pinned?"Unpin":"Pin to the device"}</button>
<button
type="button"
onClick=${()=>c(()=>Me(`${s}/download`,`${e.id.replaceAll("/","-")}.tar.gz`))}
>Download</button>
${i.length>0&&l`<span class="row group">
<select
aria-label="Generation to roll back to"
value=${d||i[0].generation}
onChange=${f=>p(f.target.value)}
>
${i.map(f=>l`<option value=${f.generation}>${f.generation.slice(0,8)}, ${X(f.created)}, ${f.source}</option>`)}
</select>
<button
type="button"
onClick=${()=>c(()=>U(`${s}/rollback`,{generation:d||i[0].generation}))}
>Roll back</button>
</span>`}
<span class="grow"></span>
<button type="button" class="danger" onClick=${()=>o("delete")}>Delete…</button>
</div>
<div class="split">
<${gr} adapter=${e} />
<${xr} adapter=${e} />
</div>
${a==="delete"&&l`<${Ne} title=${`Delete ${e.id}?`} verb="Delete" act=${h} onClose=${()=>o("")}>
<p>New requests for this name will be refused at once; those that run finish. Its files go when nothing needs them any more.</p>
<//>`}
</div>`}function Sr(e,t){let n=t.match(/\S+|\s+/g)??[],r=n.filter(i=>i.trim()),a=Mo(e.match(/\S+/g)??[],r),o=[],s=0;for(let i of n){let d=o.at(-1),p=i.trim()?!a[s++]:!!(d?.differs&&s<a.length&&!a[s]);d&&d.differs===p?d.text+=i:o.push({text:i,differs:p})}return o}function Mo(e,t){let n=new Array(t.length).fill(!1),r=0;for(;r<e.length&&r<t.length&&e[r]===t[r];)n[r++]=!0;let a=e.slice(r),o=t.slice(r);if(!a.length||!o.length||a.length>1500||o.length>1500)return n;let s=o.length+1,i=new Uint16Array((a.length+1)*s);for(let d=a.length-1;d>=0;d--)for(let p=o.length-1;p>=0;p--)i[d*s+p]=a[d]===o[p]?i[(d+1)*s+p+1]+1:Math.max(i[(d+1)*s+p],i[d*s+p+1]);for(let d=0,p=0;d<a.length&&p<o.length;)a[d]===o[p]?(n[r+p]=!0,d++,p++):i[(d+1)*s+p]>=i[d*s+p+1]?d++:p++;return n}var Oo=e=>`'${e.replaceAll("'","'\\''")}'`;function Cr(e,t,n,r){let a=[`curl ${e}${t}`,"-H 'Content-Type: application/json'"];return r&&a.push('-H "Authorization: Bearer $LORAMUX_API_KEY"'),a.push(`-d ${Oo(JSON.stringify(n,null,2))}`),a.join(` \\
  `)}function Er(e,t,n,r){let a=t.endsWith("/chat/completions")?"chat.completions":"completions",o=Object.entries(n).map(([d,p])=>`    ${d}=${sn(p,"    ")},`),s=r?'os.environ["LORAMUX_API_KEY"]':'"none"',i=a==="completions"?"answer.choices[0].text":"answer.choices[0].message.content";return[...r?["import os",""]:[],"from openai import OpenAI","",`client = OpenAI(base_url=${JSON.stringify(`${e}/v1`)}, api_key=${s})`,`answer = client.${a}.create(`,...o,")",`print(${i})`,""].join(`
`)}function sn(e,t){return e===null?"None":typeof e=="boolean"?e?"True":"False":Array.isArray(e)?`[
${e.map(n=>`${t}    ${sn(n,`${t}    `)},
`).join("")}${t}]`:typeof e=="object"?`{${Object.entries(e).map(([n,r])=>`${JSON.stringify(n)}: ${sn(r,t)}`).join(", ")}}`:JSON.stringify(e)}var Ie=e=>["waiting","streaming"].includes(e.status.value);function Tr(){let e=K.value.query;A(()=>hr(e,Y.value),[e]);let t=I.value;return l`<section class="compare">
<h1 class="hidden">Compare</h1>
<${Po} />
<div class="columns" data-count=${t.length}>
${t.map((n,r)=>l`<${Do}
key=${n.id}
column=${n}
first=${r?t[0]:null}
removable=${t.length>1}
/>`)}
</div>
</section>`}function Po(){let{mode:e,system:t,prompt:n,sampling:r}=V.value,a=I.value,o=D(),s=a.some(Ie),i=n.trim()&&a.length,d=c=>{c.key==="Enter"&&(c.ctrlKey||c.metaKey)&&i&&(c.preventDefault(),Qt())},p=(c,h,f)=>l`<${N} label=${c.replace("_"," ")}>
<input
type="number"
step=${h}
...${f}
value=${r[c]??""}
onInput=${u=>Je({sampling:{...r,[c]:u.target.value===""?null:u.target.valueAsNumber}})}
/>
<//>`;return l`<form
class="panel ask"
onKeyDown=${d}
onSubmit=${c=>(c.preventDefault(),i&&Qt())}
>
<div class="row spread wrap">
<div class="segments" role="group" aria-label="Kind of prompt">
${["chat","text"].map(c=>l`<button type="button" aria-pressed=${e===c} onClick=${()=>Je({mode:c})}>
${c==="chat"?"Chat":"Completion"}
</button>`)}
</div>
<div class="row">
<${Pe} text=${vr} label="Copy link" title="An address that opens this comparison" />
<button
type="button"
disabled=${a.length>=yt}
onClick=${()=>pr(No())}
>Add column</button>
</div>
</div>
${e==="chat"&&l`<${N} label="System message" wide>
<textarea
rows="1"
value=${t}
placeholder="Optional"
onInput=${c=>Je({system:c.target.value})}
></textarea>
<//>`}
<${N} label=${e==="chat"?"Message":"Text to continue"} wide>
<textarea
ref=${o}
rows="3"
value=${n}
placeholder=${e==="chat"?"Ask all columns the same":"Once upon a time"}
onInput=${c=>Je({prompt:c.target.value})}
></textarea>
<//>
<div class="row spread bottom">
<div class="row fields">
${p("temperature",.1,{min:0,max:2})} ${p("top_p",.05,{min:0,max:1})}
${p("max_tokens",1,{min:1})} ${p("seed",1,{})}
</div>
${s?l`<button key="stop" type="button" onClick=${()=>a.forEach(ce)}>Stop all</button>`:l`<button key="send" class="primary" disabled=${!i}>Send <kbd>Ctrl ↵</kbd></button>`}
</div>
</form>`}function No(){let[e]=Y.value,t=new Set(I.value.map(n=>n.model.value));return(Y.value.find(n=>!t.has(n.id)&&(n.parent||n===e))??e).id}function Do({column:e,first:t,removable:n}){let r=e.turns.value,a=e.model.value,[o,s]=Zt(e,Ro(r));return l`<article class="panel column" aria-label=${a}>
<header>
<${vt} label="Model of this column" value=${a} onChange=${i=>ur(e,i)} />
<button
type="button"
class="quiet icon"
aria-label=${`Remove column ${a}`}
disabled=${!n}
onClick=${()=>fr(e)}
>✕</button>
</header>
<div
class="turns"
role="log"
aria-live="polite"
aria-busy=${Ie(e)}
tabindex="0"
aria-label=${`Answers of ${a}`}
>
${!r.length&&l`<p class="muted">${a}'s answer will appear here.</p>`}
${r.map((i,d)=>l`<${Io}
turn=${i}
other=${t?.turns.value[d]}
column=${e}
first=${t}
/>`)}
<${x} error=${e.error.value} />
</div>
<${Lo} column=${e} />
<${qo} column=${e} />
<footer class="row">
<${Pe} label="Copy as curl" text=${()=>Cr(location.origin,o,s,!!L.value)} />
<${Pe} label="Copy as Python" text=${()=>Er(location.origin,o,s,!!L.value)} />
</footer>
</article>`}var Ro=e=>e.at(-1)?.role==="assistant"?e.slice(0,-1):e.length?e:[{role:"user",content:V.value.prompt}];function Io({turn:e,other:t,column:n,first:r}){let a=e.role!=="user",s=a&&r&&t?.role===e.role&&!Ie(n)&&!Ie(r)?Sr(t.content,e.content):[{text:e.content,differs:!1}];return l`<div class=${`turn ${e.role}`}>
<span class="hidden">${e.role}: </span>
<span class="text">${s.map(({text:i,differs:d})=>d?l`<mark>${i}</mark>`:i)}</span>
${a&&Ie(n)&&l`<span class="caret" aria-hidden="true"></span>`}
</div>`}var jo={length:"cut at max tokens",stop:"finished"};function Lo({column:e}){let t=e.figures.value,n=e.status.value,r={idle:"Ready",waiting:"Waiting",streaming:"Streaming",stopped:"Stopped",error:"Failed",done:jo[t?.finish]??"finished"};return l`<div class="row spread wrap measured">
<dl class="figures">
<div><dt>TTFT</dt><dd data-figure="ttft">${Q(t?.ttft)}</dd></div>
<div><dt>tokens/s</dt><dd data-figure="rate">${E(t?.rate)}</dd></div>
<div><dt>tokens</dt><dd data-figure="tokens">${t?.tokens||"–"}</dd></div>
</dl>
<${F} kind=${n}>${r[n]}<//>
</div>`}function qo({column:e}){let[t,n]=m(""),r=V.value.mode==="text",a=o=>{o.preventDefault(),!(!r&&!t.trim())&&(en(e,t),n(""))};return Ie(e)?l`<button type="button" class="full" onClick=${()=>ce(e)}>Stop</button>`:e.turns.value.length?l`<form class="row continue" onSubmit=${a}>
<input
type="text"
value=${t}
aria-label=${`Continue with ${e.model.value}`}
placeholder=${r?"Add text, or just continue":"Continue this column"}
onInput=${o=>n(o.target.value)}
/>
<button>${r?"Continue":"Send"}</button>
</form>`:null}function Ar(){let[e,t]=m("");return l`<form class="panel login" onSubmit=${r=>{r.preventDefault(),sessionStorage.clear(),Bt(e.trim()),location.reload()}}>
<h1>This server asks for a key</h1>
<p role="alert">${Z.value}</p>
<${N} label="API key" wide>
<input
type="password"
autocomplete="current-password"
required
autofocus
value=${e}
onInput=${r=>t(r.target.value)}
/>
<//>
<button class="primary full">Sign in</button>
<p class="hint">It is kept in this tab until you close it.</p>
</form>`}var re={top:8,right:12,bottom:24,left:52};function wt({label:e,xs:t,series:n,height:r=220,format:a,describe:o}){let s=D(),[i,d]=m(0),[p,c]=m(null);A(()=>{let $=new ResizeObserver(([b])=>d(b.contentRect.width));return $.observe(s.current),()=>$.disconnect()},[]);let h=n.flatMap($=>$.values.filter(b=>b!=null)),f=Uo(Math.min(0,...h),Math.max(...h,1e-9),r/48),u=Mr(t[0],t.at(-1),re.left,i-re.right),_=Mr(f[0],f.at(-1),r-re.bottom,re.top),y=$=>{let b=$.clientX-s.current.getBoundingClientRect().left;c(t.reduce((v,w,k)=>Math.abs(u(w)-b)<Math.abs(u(t[v])-b)?k:v,0))},g=p!==null&&p<t.length?p:null;return l`<figure class="chart">
<div ref=${s}>
${i>0&&l`<svg
width=${i}
height=${r}
role="img"
aria-label=${`${e}. ${zo(n,a)}`}
onPointerMove=${y}
onPointerLeave=${()=>c(null)}
>
${f.map($=>l`<g><line
class="grid"
x1=${re.left}
x2=${i-re.right}
y1=${_($)}
y2=${_($)}
/><text x=${re.left-8} y=${_($)+4} text-anchor="end">${a($)}</text></g>`)}
${Wo(t,i).map($=>l`<text x=${u($)} y=${r-6} text-anchor="middle">${o($)}</text>`)}
${g!==null&&l`<line
class="cursor"
x1=${u(t[g])}
x2=${u(t[g])}
y1=${re.top}
y2=${r-re.bottom}
/>`}
${n.map(({values:$,points:b},v)=>l`<g class=${`line-${v+1}`}>
<path d=${Fo(t,$,u,_)} />
${t.map((w,k)=>$[k]!=null&&(b||k===g||t.length===1)&&l`<circle cx=${u(w)} cy=${_($[k])} r="3.5" />`)}
</g>`)}
</svg>`}
</div>
<figcaption>
${g!==null&&l`<span class="muted">${o(t[g])}</span>`}
${n.map(({label:$,values:b},v)=>l`<span class=${`line-${v+1}`}><i></i>${$} <b>${a(b[g??Or(b)])}</b></span>`)}
</figcaption>
</figure>`}var Mr=(e,t,n,r)=>a=>t===e?(n+r)/2:n+(a-e)/(t-e)*(r-n),Or=e=>e.findLastIndex(t=>t!=null),zo=(e,t)=>e.map(({label:n,values:r})=>`${n}: from ${t(r.find(a=>a!=null))} to ${t(r[Or(r)])}`).join("; ");function Fo(e,t,n,r){return e.map((o,s)=>[o,t[s]]).filter(([,o])=>o!=null).map(([o,s],i)=>`${i?"L":"M"}${n(o).toFixed(1)} ${r(s).toFixed(1)}`).join("")}function Uo(e,t,n){let r=(t-e)/Math.max(1,n),a=10**Math.floor(Math.log10(r)),o=[1,2,5,10].map(i=>i*a).find(i=>i>=r),s=Math.floor(e/o);return Array.from({length:Math.ceil(t/o)-s+1},(i,d)=>(s+d)*o)}function Wo(e,t){let n=Math.min(e.length,Math.max(2,Math.floor(t/110)));return n<2?e.slice(0,1):Array.from({length:n},(r,a)=>e[Math.round(a*(e.length-1)/(n-1))])}var xt=async()=>Bo(await Ht("/metrics",{headers:{Accept:"text/plain"}}));function Bo(e){let t=new Map;for(let n of e.split(`
`)){let r=/^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(n);if(!r)continue;let a={};for(let[,o,s]of(r[2]??"").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g))a[o]=s.replace(/\\n/g,`
`).replace(/\\(.)/g,"$1");t.has(r[1])||t.set(r[1],[]),t.get(r[1]).push({labels:a,value:Number(r[3].replace("Inf","Infinity"))})}return t}var q=(e,t)=>(e.get(t)??[]).reduce((n,{value:r})=>n+r,0),Ge=(e,t,n)=>Object.fromEntries((e.get(t)??[]).map(({labels:r,value:a})=>[r[n],a]));function ln(e,t,n,r){let a=new Map((t?.get(`${n}_bucket`)??[]).map(({labels:p,value:c})=>[p.le,c])),o=(e.get(`${n}_bucket`)??[]).map(({labels:p,value:c})=>({top:p.le==="+Inf"?1/0:Number(p.le),count:c-(a.get(p.le)??0)})).sort((p,c)=>p.top-c.top),s=o.at(-1)?.count??0;if(!s)return null;let i=0,d=0;for(let{top:p,count:c}of o){if(c>=r*s)return p===1/0?i:i+(p-i)*(r*s-d)/Math.max(1,c-d);i=p,d=c}return i}function cn(e,t,n){let r=q(e,`${n}_count`)-(t?q(t,`${n}_count`):0),a=q(e,`${n}_sum`)-(t?q(t,`${n}_sum`):0);return r>0?a/r:null}var Ho=5,Jo=["Key","Tenant","May","State","Expires","Requests/min","Tokens/min","Made"],Ko={active:"good",expired:"warn"},Vo={infer:"infer: ask models",adapters:"adapters: upload, change, export",train:"train: files and jobs",metrics:"metrics: figures of everybody",admin:"admin: everything, of everybody"},kt=86400,Go=[["","never"],[kt,"in a day"],[30*kt,"in 30 days"],[90*kt,"in 90 days"],[365*kt,"in a year"]];function dn(){let[e,t]=m(null),[n,r]=m(null),[a,o]=m(null),s=D(!1),i=W(async d=>{if(!(!L.value||s.current))try{let{data:p}=await R("/v1/keys");d()&&(t(p.toSorted((c,h)=>(h.state==="active")-(c.state==="active")||h.created-c.created)),r(null))}catch(p){s.current=p.status===403,d()&&r(p)}},Ho);return L.value?s.current?l`<div class="panel">
<h2>Keys</h2>
<p>This tab uses the key that ends in <code>${L.value.slice(-4)}</code>. What it may not see is refused with a sentence that says so; keys are for admins.</p>
</div>`:l`<div class="panel keys">
<div class="row spread wrap">
<h2>Keys</h2>
<button type="button" onClick=${()=>o("new")}>New key…</button>
</div>
<${x} error=${n} />
${e?.length===0&&l`<${Oe} title="No keys but those that the server was started with">Make one for each program or person that uses it, with no more than it needs.<//>`}
${e?.length>0&&l`<div class="scroll" tabindex="0" role="region" aria-label="Table of keys">
<table>
<thead><tr>
${Jo.map(d=>l`<th scope="col">${d}</th>`)}
<th scope="col"><span class="hidden">Actions</span></th>
</tr></thead>
<tbody>${e.map(d=>l`<${Yo} key=${d.id} one=${d} onRevoke=${()=>o(d)} />`)}</tbody>
</table>
</div>`}
${a==="new"&&l`<${Zo} onClose=${()=>(o(null),i())} />`}
${a?.id&&l`<${Ne}
title=${`Revoke ${a.name||a.id}?`}
verb="Revoke"
act=${async()=>(await Te(`/v1/keys/${a.id}`),i())}
onClose=${()=>o(null)}
>
<p>It opens nothing any more, for good. Requests that it has begun finish.${a.current&&" It is the key of this tab: you will be asked for another one."}</p>
<//>`}
</div>`:null}var Pr=e=>e===null?"the server's":e||"none";function Yo({one:e,onRevoke:t}){return l`<tr data-key=${e.id}>
<th scope="row">${e.name||e.id} ${e.current&&l`<${F}>this tab's<//>`}${e.name&&l`<br /><code class="muted">${e.id}</code>`}</th>
<td>${e.scopes.includes("admin")?"–":e.tenant}</td>
<td>${e.scopes.join(", ")}</td>
<td><${F} kind=${Ko[e.state]}>${e.state}<//></td>
<td>${e.expires===null?"never":tn(e.expires)}</td>
<td>${Pr(e.requests_per_minute)}</td>
<td>${Pr(e.tokens_per_minute)}</td>
<td>${X(e.created)}</td>
<td class="actions">${e.state!=="revoked"&&l`<button type="button" class="danger" aria-label=${`Revoke ${e.name||e.id}`} onClick=${t}>Revoke…</button>`}</td>
</tr>`}var Xo={name:"",tenant:"default",scopes:["infer"],expires_in:"",requests_per_minute:"",tokens_per_minute:""};function Zo({onClose:e}){let[t,n]=m(Xo),[r,a]=m(null),[o,s]=m(null),[i,d]=m(!1),p=f=>n({...t,...f}),c=async f=>{f.preventDefault(),s(null),d(!0);let u=Object.fromEntries(Object.entries(t).filter(([,_])=>_!==""));try{a(await U("/v1/keys",u))}catch(_){s(_),d(!1)}};if(r)return l`<${_t} title="The key is made" onClose=${e}>
<p>It is shown this once: copy it now. The server keeps no more of it than it takes to recognize it.</p>
<p class="row"><code class="secret grow" tabindex="0">${r.key}</code><${Pe} text=${()=>r.key} label="Copy" /></p>
<div class="row end"><button type="button" class="primary" onClick=${e}>Done</button></div>
<//>`;let h=(f,u)=>l`<${N} label=${u} hint="empty: the server's; 0: none">
<input
type="number"
min="0"
step="1"
value=${t[f]}
onInput=${({target:_})=>p({[f]:_.value===""?"":_.valueAsNumber})}
/>
<//>`;return l`<${_t} title="New key" onClose=${e}>
<form onSubmit=${c}>
<${N} label="Name" hint="what it is for"><input
type="text"
maxlength="128"
value=${t.name}
onInput=${({target:f})=>p({name:f.value})}
/><//>
<${N} label="Tenant" hint="whose adapters, files and jobs it reaches, beside what is shared"><input
type="text"
required
value=${t.tenant}
onInput=${({target:f})=>p({tenant:f.value})}
/><//>
<fieldset>
<legend>What it may do</legend>
${Object.entries(Vo).map(([f,u])=>l`<${ne}
label=${u}
checked=${t.scopes.includes(f)}
onChange=${_=>p({scopes:[...t.scopes.filter(y=>y!==f),..._?[f]:[]]})}
/>`)}
</fieldset>
<${N} label="Expires"><select
value=${t.expires_in}
onChange=${({target:f})=>p({expires_in:f.value&&Number(f.value)})}
>
${Go.map(([f,u])=>l`<option value=${f}>${u}</option>`)}
</select><//>
${h("requests_per_minute","Requests a minute")} ${h("tokens_per_minute","Tokens a minute")}
<${x} error=${o} />
<div class="row end">
<button type="button" onClick=${e}>Cancel</button>
<button class="primary" disabled=${i||!t.scopes.length}>Make key</button>
</div>
</form>
<//>`}var Qo=2,ea=150,ta=15;function Nr(){let e=D([]),[t,n]=m(null),[r,a]=m(""),[o,s]=m(null);if(W(async c=>{try{let h=await xt();r||a((await R("/version")).version),e.current=[...e.current,{at:performance.now()/1e3,time:Date.now()/1e3,samples:h}].slice(-ea),c()&&(n(e.current),s(null))}catch(h){c()&&s(h)}},Qo),!t)return l`<section>
<${x} error=${o} />${!o&&l`<p class="muted">Asking the server…</p>`}
<${dn} />
</section>`;let i=t.at(-1).samples,d=t.at(-1-Math.min(ta,t.length-1))?.samples,p=t.length>1?d:null;return l`<section>
<div class="row spread wrap">
<h1>${B.value?.id??"Server"}</h1>
<span class="muted">${B.value?.root!==B.value?.id&&`${B.value?.root}, `}${na(i)}, loramux ${r}</span>
</div>
<${ra} now=${i} window=${p} readings=${t} />
<${oa} readings=${t} />
<div class="split">
<${sa} now=${i} window=${p} />
<${la} now=${i} />
</div>
<${dn} />
</section>`}function na(e){let{quantization:t,dtype:n}=e.get("loramux_model_info")?.[0]?.labels??{};return`${t?.toUpperCase()}, computes in ${n}`}function Dr(e,t,n){let r=q(e.samples,n)-q(t.samples,n);return Math.max(0,r)/(e.at-t.at)}function ra({now:e,window:t,readings:n}){let[r,a]=n.slice(-2),s=[["engine",Object.entries(Ge(e,"loramux_engine_state","state")).find(([,i])=>i)?.[0]??"–"],["tokens/s",a?E(Dr(a,r,"loramux_generation_tokens_total")):"–"],["running",q(e,"loramux_num_requests_running")],["waiting",q(e,"loramux_num_requests_waiting")],["tokens in a step",E(cn(e,t,"loramux_batch_size"))],["adapters in a step",E(cn(e,t,"loramux_batch_adapters"))],["KV cache in use",`${E(100*q(e,"loramux_kv_cache_usage_perc"))} %`],["adapter slots",`${q(e,"loramux_adapter_slots_used")} of ${q(e,"loramux_adapter_slots")}`],["jobs training",Ge(e,"loramux_training_jobs","status").running??0],["worker restarts",q(e,"loramux_worker_restarts_total")]];return l`<dl class="panel figures tiles">${s.map(([i,d])=>l`<div><dt>${i}</dt><dd>${d}</dd></div>`)}</dl>`}function oa({readings:e}){let t=e.slice(1);if(!t.length)return l`<div class="panel"><h2>Tokens a second</h2><p class="muted">A moment…</p></div>`;let n=a=>t.map((o,s)=>Dr(o,e[s],a)),r=[{label:"generated",values:n("loramux_generation_tokens_total")},{label:"trained on",values:n("loramux_training_tokens_total")}];return l`<div class="panel">
<h2>Tokens a second</h2>
<${wt}
label="Tokens a second over the last minutes"
xs=${t.map(a=>a.time)}
series=${r}
height=${180}
format=${E}
describe=${Re}
/>
</div>`}var aa={"Time to first token":"loramux_time_to_first_token_seconds","Between tokens":"loramux_inter_token_latency_seconds","Whole request":"loramux_e2e_request_latency_seconds","In the queue":"loramux_request_queue_time_seconds","Engine step":"loramux_step_seconds"};function sa({now:e,window:t}){let n=(r,a)=>Q(ln(e,t,r,a)??ln(e,null,r,a));return l`<div class="panel"><h2>Latency</h2>
<table>
<thead><tr><th scope="col"><span class="hidden">Of</span></th>${["p50","p95","p99"].map(r=>l`<th scope="col" class="n">${r}</th>`)}</tr></thead>
<tbody>
${Object.entries(aa).map(([r,a])=>l`<tr><th scope="row">${r}</th>${[.5,.95,.99].map(o=>l`<td class="n">${n(a,o)}</td>`)}</tr>`)}
</tbody>
</table>
<p class="hint">Of the last half minute; of all time where nothing happened in it.</p>
</div>`}var ia={weights:"Weights of the base",kv_cache:"KV cache",adapter_pool:"Adapters on the device",adapter_host:"Adapters in host memory"};function la({now:e}){let t=Ge(e,"loramux_memory_bytes","kind"),n=Math.max(...Object.values(t),1),r=Ge(e,"loramux_data_disk_bytes","state");return l`<div class="panel"><h2>Memory</h2>
<ul class="bars">
${Object.entries(ia).map(([a,o])=>l`<li><span>${o}</span><span class="track"><span style=${{width:`${100*(t[a]??0)/n}%`}}></span></span><span class="n">${j(t[a]??0)}</span></li>`)}
</ul>
<dl class="facts">
<dt>Worker process</dt><dd>${j(q(e,"loramux_worker_resident_memory_bytes"))}</dd>
<dt>Free on the data disk</dt><dd>${j(r.free)} of ${j(r.total)}</dd>
</dl>
</div>`}var ca=64,St=new Map;function Rr({job:e,checkpoints:t}){let[n,r]=m(e.metadata?.sample_prompt??""),[a,o]=m(n),[s,i]=m(0),[,d]=m(0),p=D(new Map).current,c=[{model:e.model,label:`${e.model}, before`},...t.toSorted((f,u)=>f.step_number-u.step_number).map(f=>({model:f.fine_tuned_model_checkpoint,label:`step ${f.step_number}`,loss:f.metrics.valid_loss??f.metrics.train_loss})),...e.fine_tuned_model?[{model:e.fine_tuned_model,label:"finished"}]:[]],h=t.length||e.fine_tuned_model?c:[];return A(()=>{let f=new AbortController;return(async()=>{for(let{model:u}of n?h:[]){let _=JSON.stringify([u,n]);if(!St.has(_)){try{St.set(_,await da(u,n,f.signal)),p.delete(_)}catch(y){if(y.name==="AbortError")return;p.set(_,y)}d(y=>y+1)}}})(),()=>f.abort()},[n,s,h.map(f=>f.model).join(),$e.value]),l`<div class="panel">
<h2>Samples</h2>
<form class="row" onSubmit=${f=>(f.preventDefault(),r(a.trim()),i(s+1))}>
<input
type="text"
class="grow"
value=${a}
aria-label="Prompt for samples"
placeholder="A prompt that the base and every checkpoint answer"
onInput=${f=>o(f.target.value)}
/>
<button>Ask all</button>
</form>
${!h.length&&l`<p class="muted">Checkpoints appear here as they are made; each can be called at once.</p>`}
<ul class="samples">
${h.map(({model:f,label:u,loss:_})=>{let y=JSON.stringify([f,n]);return l`<li key=${f} data-sample=${f}>
<div class="row spread"><strong>${u}</strong><span class="row">${_!=null&&l`<span class="muted">loss ${E(_)}</span>`}<a href=${De([e.model,f],n)}>Compare</a></span></div>
${n&&(p.has(y)&&!St.has(y)?l`<${x} error=${p.get(y)} />`:l`<p class="text">${St.get(y)??"…"}</p>`)}
</li>`})}
</ul>
</div>`}async function da(e,t,n){return(await U("/v1/chat/completions",{model:e,messages:[{role:"user",content:t}],temperature:0,max_tokens:ca},{signal:n})).choices[0].message.content}var un=["succeeded","failed","cancelled"];function Ir({id:e}){let t=`/v1/fine_tuning/jobs/${encodeURIComponent(e)}`,[n,r]=m(null),[a,o]=m([]),[s,i]=m(null),[d,p]=m(!1),c=ua(t),h=W(async y=>{try{let[g,$]=await Promise.all([R(t),R(`${t}/checkpoints?limit=1000`)]);if(!y())return;r(g),o(b=>JSON.stringify(b)===JSON.stringify($.data)?b:$.data)}catch(g){y()&&i(g)}},n&&un.includes(n.status)?30:2,[t]),f=y=>async()=>{i(null);try{r(await U(`${t}/${y}`)),h()}catch(g){i(g)}};if(!n)return l`<section><${x} error=${s} />${!s&&l`<p class="muted">Asking the server…</p>`}</section>`;let{status:u}=n,_=n.fine_tuned_model;return l`<section>
<div class="row spread wrap">
<h1 class="name">${_??n.id}</h1>
<span class="row wrap">
${_&&l`<a
class="button primary"
href=${De([n.model,_],n.metadata?.sample_prompt)}
>Try it</a>`}
${["queued","running"].includes(u)&&l`<button type="button" onClick=${f("pause")}>Pause</button>`}
${u==="paused"&&l`<button type="button" onClick=${f("resume")}>Resume</button>`}
${!un.includes(u)&&l`<button type="button" class="danger" onClick=${()=>p(!0)}>Cancel…</button>`}
<a class="button" href="#/train">All jobs</a>
</span>
</div>
<${x} error=${n.error} title="The job ended with an error" />
<${x} error=${s} />
<${pa} job=${n} steps=${c.steps} />
<${fa} steps=${c.steps} />
<div class="split">
<${ma} events=${c.said} />
<${va} job=${n} />
</div>
<${Rr} job=${n} checkpoints=${a} />
${d&&l`<${Ne}
title="Cancel this job?"
verb="Cancel the job"
act=${f("cancel")}
onClose=${()=>p(!1)}
>
<p>It cannot be resumed. Its checkpoints stay and can be called.</p>
<//>`}
</section>`}function ua(e){let[t,n]=m({steps:new Map,said:[]});return A(()=>{let r=new AbortController,a=new Map,o=[],s=0,i=()=>{s=0,n({steps:new Map(a),said:[...o]})};return(async()=>{for await(let d of Ae("GET",`${e}/events?stream=true`,{signal:r.signal}))d.type==="metrics"?a.set(d.data.step,{...a.get(d.data.step),...d.data}):o.push(d),s||=requestAnimationFrame(i)})().catch(()=>{}),()=>{cancelAnimationFrame(s),r.abort()}},[e,$e.value]),t}function pa({job:e,steps:t}){let n=[...t.values()].findLast(a=>a.train_loss!==void 0),r=e.status==="running"&&e.estimated_finish?e.estimated_finish-Date.now()/1e3:null;return l`<div class="panel">
<dl class="figures">
<div><dt>status</dt><dd><${F} kind=${pn[e.status]}>${fn[e.status]??e.status}<//></dd></div>
<div><dt>step</dt><dd>${n?`${n.step} of ${n.total_steps}`:"–"}</dd></div>
<div><dt>loss</dt><dd>${E(n?.train_loss)}</dd></div>
<div><dt>tokens/s</dt><dd>${E(n?.tokens_per_second)}</dd></div>
<div><dt>learning rate</dt><dd>${E(n?.learning_rate,2)}</dd></div>
<div><dt>${r===null?"created":"left"}</dt><dd>${r===null?X(e.created_at):Q(Math.max(0,r))}</dd></div>
</dl>
${n&&!un.includes(e.status)&&l`<${le} label="Training" value=${n.step/n.total_steps} />`}
</div>`}function fa({steps:e}){let t=[...e.keys()].sort((o,s)=>o-s),n=(o,s,i)=>({label:o,points:i,values:t.map(d=>e.get(d)[s]??null)}),a=[n("training loss","train_loss"),n("validation loss","valid_loss",!0)].filter(({values:o})=>o.some(s=>s!==null));return a.length?l`<div class="panel"><h2>Loss</h2><${wt}
label="Loss by step"
xs=${t}
series=${a}
format=${E}
describe=${o=>`step ${o}`}
/></div>`:l`<div class="panel"><p class="muted">The loss appears here with the first step.</p></div>`}function ma({events:e}){let t=e.filter(n=>n.level!=="info");return l`<div class="panel">
${t.length>0&&l`<h2>Diagnoses</h2>
${t.map(n=>l`<p
class=${n.level==="error"?"problem":"note"}
key=${n.id}
>${n.message}</p>`)}`}
<h2>Events</h2>
<div class="events" role="log" aria-live="polite" tabindex="0" aria-label="Events">
<ol>
${e.toReversed().map(n=>l`<li key=${n.id}><time>${Re(n.created_at)}</time> ${n.message}</li>`)}
</ol>
</div>
</div>`}var ha=["n_epochs","batch_size","learning_rate","r","lora_alpha","max_seq_length","target_modules","total_steps"];function va({job:e}){let t=e.hyperparameters,n=r=>Array.isArray(r)?r.join(" "):typeof r=="number"?E(r):String(r);return l`<div class="panel">
<h2>Recipe</h2>
<dl class="facts">
<dt>trained on</dt><dd>${e.model}</dd>
${ha.filter(r=>t[r]!==void 0).map(r=>l`<dt>${r}</dt><dd>${n(t[r])}</dd>`)}
<dt>seed</dt><dd>${e.seed}</dd>
${e.trained_tokens!==null&&l`<dt>trained</dt><dd>${ye(e.trained_tokens,"token")}</dd>`}
</dl>
${e.result_files.map(r=>l`<${_a} id=${r} />`)}
</div>`}function _a({id:e}){let[t,n]=m(null);return A(()=>{R(`/v1/files/${e}`).then(n,()=>{})},[e]),t?l`<button
type="button"
class="quiet"
onClick=${()=>Me(`/v1/files/${e}/content`,t.filename)}
>${t.filename} <span class="muted">${j(t.bytes)}</span></button>`:null}var jr="loramux.recipe",mn={model:"",file:null,validation:null,suffix:"",prompt:"",fields:{}},de=C(ga());function ga(){try{return{...mn,...JSON.parse(sessionStorage.getItem(jr)??"{}")}}catch{return{...mn}}}function oe(e){de.value={...de.value,...e},sessionStorage.setItem(jr,JSON.stringify(de.value))}var Ye=(e,t)=>oe({fields:{...de.value.fields,[e]:t}}),Lr=()=>oe(mn),qr={n_epochs:{label:"Epochs",step:1,min:1},batch_size:{label:"Batch size",step:1,min:1},learning_rate:{label:"Learning rate",step:"any",min:0},r:{label:"Rank r",step:1,min:1},lora_alpha:{label:"LoRA alpha",step:"any",min:0},max_seq_length:{label:"Longest row, tokens",step:1,min:8},max_steps:{label:"Stop after steps",step:1,min:1},save_steps:{label:"Checkpoint every",step:1,min:1}};function hn({model:e,file:t,validation:n,suffix:r,prompt:a,fields:o},s){let i=Object.fromEntries(Object.entries(o).filter(([,d])=>d!==""&&d!==!1&&d!==null));return{model:e||s,training_file:t.id,...n&&{validation_file:n.id},...r&&{suffix:r},...a&&{metadata:{sample_prompt:a.slice(0,512)}},method:{type:"supervised",supervised:{hyperparameters:i}}}}function zr(e,t,n){let r=n(t,"loramux_training_tokens_total"),a=n(t,"loramux_training_seconds_total"),o=e.total_steps/e.steps_per_epoch;if(r>0&&a>0)return[e.trained_tokens*o*a/r,"at the speed of this server's training so far"];let s=n(t,"loramux_request_prompt_tokens_sum"),i=n(t,"loramux_request_prefill_time_seconds_sum");return s>0&&i>0?[3*e.tokens*o*i/s,"a guess from how fast this server reads prompts"]:[null,"not known before this server has answered a request"]}function Fr({plan:e}){let[t,n]=m(0),[r,a]=m(!1),o=e.preview[Math.min(t,e.preview.length-1)],s=e.exact?"":"about ";return l`<div class="panel preview">
<dl class="figures">
<div><dt>rows</dt><dd>${e.rows.toLocaleString("en")}</dd></div>
<div><dt>tokens</dt><dd>${s}${e.tokens.toLocaleString("en")}</dd></div>
<div><dt>trained on</dt><dd>${s}${e.trained_tokens.toLocaleString("en")}</dd></div>
<div><dt>longest row</dt><dd>${ye(e.longest,"token")}</dd></div>
${e.validation_rows>0&&l`<div><dt>validation rows</dt><dd>${e.validation_rows.toLocaleString("en")}</dd></div>`}
</dl>
${e.warnings.map(i=>l`<p class="note">${i[0].toUpperCase()+i.slice(1)}.</p>`)}
<div class="row spread wrap">
<span class="row">
<button
type="button"
aria-label="Previous row"
disabled=${t===0}
onClick=${()=>n(t-1)}
>‹</button>
<span>Line ${o.line}, ${ye(o.tokens,"token")}, <mark class="learned">${o.trained_tokens} trained on</mark></span>
<button
type="button"
aria-label="Next row"
disabled=${t>=e.preview.length-1}
onClick=${()=>n(t+1)}
>›</button>
</span>
<div class="segments" role="group" aria-label="How rows are shown">
<button type="button" aria-pressed=${!r} onClick=${()=>a(!1)}>As a chat</button>
<button
type="button"
aria-pressed=${r}
onClick=${()=>a(!0)}
>As the trainer reads it</button>
</div>
</div>
${r?l`<pre class="tokens" tabindex="0">${o.parts.map(({text:i,trained:d})=>d?l`<mark class="learned">${i}</mark>`:i)}</pre>`:l`<div class="turns">
${o.turns.map(({role:i,content:d,trained:p})=>l`<div class=${`turn ${i}`}>
<span class="role">${i}</span>
<span class="text">${p?l`<mark class="learned">${d}</mark>`:d}</span>
</div>`)}
</div>`}
</div>`}var $a={"":"Automatic","all-linear":"All linears",attention:"Attention","attention-qv":"Attention, q and v"},ba=400;function Wr(){let{file:e,validation:t,model:n,suffix:r,prompt:a,fields:o}=de.value,[s,i]=m(null),[d,p]=m(!1),[c,h]=m(null),[f,u]=m(null),[_,y]=m(!1),[g,$]=m([null,""]);A(()=>{if(h(null),!e)return i(null);let v=new AbortController,w=setTimeout(async()=>{p(!0);try{let k=await U("/v1/fine_tuning/plan",hn(de.value,B.value.id),{signal:v.signal});i(k),$(await xt().then(z=>zr(k,z,q),()=>[null,"this key may not see how fast the server is"]))}catch(k){if(k.name==="AbortError")return;h(k),k.param?.endsWith("_file")&&i(null),k.code==="file_not_found"&&oe({file:null,validation:null})}p(!1)},ba);return()=>{clearTimeout(w),v.abort()}},[e?.id,t?.id,n,JSON.stringify(o)]);let b=async v=>{v.preventDefault(),y(!0),u(null);try{let w=await U("/v1/fine_tuning/jobs",hn(de.value,B.value.id));Lr(),location.hash=`#/train/${w.id}`}catch(w){u(w),y(!1)}};return l`<section>
<div class="row spread"><h1>New fine-tuning job</h1><a href="#/train">All jobs</a></div>
<div class="split wide">
<div>
<${Ur}
label="Drop training data here"
file=${e}
onFile=${v=>oe({file:v})}
hint="JSONL: a conversation, a prompt with its completion, or a text on every line."
/>
${e&&l`<${Ur}
label="Validation data, if you have some"
small
file=${t}
onFile=${v=>oe({validation:v})}
/>`}
<${x}
error=${c}
title=${c?.param?.endsWith("_file")?"The data cannot be trained on yet":"The recipe does not work"}
/>
${s&&l`<${Fr} plan=${s} />`}
</div>
<form class="panel recipe" onSubmit=${b}>
<h2>Recipe</h2>
<p class="muted">Fields left empty are chosen from the data.</p>
<div class="fields">
<${N} label="Model to train" wide><${vt}
label="Model to train on"
value=${n||B.value?.id}
onChange=${v=>oe({model:v})}
/><//>
<${N} label="Name" hint="becomes part of the adapter's name" wide>
<input
type="text"
value=${r}
placeholder="support"
pattern="[A-Za-z0-9._\\-]{1,64}"
title="1 to 64 letters, digits and . _ -"
onInput=${v=>oe({suffix:v.target.value})}
/>
<//>
${Object.entries(qr).map(([v,{label:w,...k}])=>l`<${N} label=${w} hint=${s?.why[v]}>
<input
type="number"
...${k}
value=${o[v]??""}
placeholder=${s?.hyperparameters[v]??(v==="max_steps"?"never":"auto")}
onInput=${z=>Ye(v,z.target.value===""?"":z.target.valueAsNumber)}
/>
<//>`)}
<${N} label="Target modules" wide>
<select
value=${o.target_modules??""}
onChange=${v=>Ye("target_modules",v.target.value)}
>
${Object.entries($a).map(([v,w])=>l`<option value=${v}>${w}</option>`)}
</select>
<//>
<${N} label="Prompt for samples" hint="answered by the base and by every checkpoint" wide>
<textarea
rows="2"
value=${a}
placeholder="What your adapter should do, as a user would ask"
onInput=${v=>oe({prompt:v.target.value})}
></textarea>
<//>
</div>
<${ne}
label="Pack short rows together"
checked=${o.packing}
onChange=${v=>Ye("packing",v)}
/>
<${ne}
label="Train on the user's words too"
checked=${o.train_on_inputs}
onChange=${v=>Ye("train_on_inputs",v)}
/>
<${ya} plan=${s} planning=${d} time=${g} />
<${x} error=${f} />
<button class="primary full" disabled=${!s||c||d||_}>Start training</button>
</form>
</div>
</section>`}function Ur({label:e,hint:t,file:n,onFile:r,small:a}){let[o,s]=m(null),[i,d]=m(null),p=async([c])=>{d(null),s(0);let h=new FormData;h.append("purpose","fine-tune"),h.append("file",c);try{let{id:f,filename:u,bytes:_}=await ft("/v1/files",h,{onProgress:s});r({id:f,filename:u,bytes:_})}catch(f){d(f)}s(null)};return l`<div class=${a?"small":""}>
<${gt} label=${n?n.filename:e} accept=".jsonl,.json,.txt" onFiles=${p}>
${n?l`<p class="muted">${j(n.bytes)} <button type="button" class="quiet" onClick=${()=>r(null)}>Remove</button></p>`:t&&l`<p class="muted">${t}</p>`}
<//>
${o!==null&&l`<div class="progress" role="status"><${le} label="Upload" value=${o} /> Sending, ${Math.round(o*100)} %</div>`}
<${x} error=${i} />
</div>`}function ya({plan:e,planning:t,time:[n,r]}){if(!e)return l`<p class="note" role="status">${t?"Reading the data…":"Drop training data to see what the run will take."}</p>`;let{memory:a}=e,o=[["optimizer and factors",a.adapter+a.gradients+a.optimizer],["layer inputs",a.layer_inputs],["activations or logits",Math.max(a.layer_activations,a.logits)]];return l`<dl class="estimate" aria-busy=${t} aria-label="Estimate">
<dt>Steps</dt><dd>${e.total_steps.toLocaleString("en")}</dd>
<dt>Memory beside serving</dt><dd>${j(a.total)} <span class="hint">${o.map(([s,i])=>`${s} ${j(i)}`).join(", ")}</span></dd>
<dt>Time</dt><dd>${n===null?"unknown":`about ${Q(n)}`} <span class="hint">${r}; requests that are served meanwhile add to it</span></dd>
<dt>Trainable</dt><dd>${ye(e.trainable_parameters,"parameter")}</dd>
</dl>`}var pn={succeeded:"good",failed:"bad",running:"busy",paused:"warn"},Br=100,fn={validating_files:"checking files"};function Hr(){let{rest:e}=K.value;return e==="new"?l`<${Wr} />`:e?l`<${Ir} key=${e} id=${e} />`:l`<${wa} />`}function wa(){let[e,t]=m(null),[n,r]=m(Br),[a,o]=m(null);W(async i=>{try{let d=await R(`/v1/fine_tuning/jobs?limit=${n}`);i()&&t(d)}catch(d){i()&&o(d)}},2,[n]);let s=e?.data;return l`<section>
<div class="row spread">
<h1>Fine-tuning</h1>
<a class="button primary" href="#/train/new">New job</a>
</div>
<${x} error=${s?null:a} />
${!s&&!a&&l`<p class="muted">Asking the server…</p>`}
${s?.length===0&&l`<${Oe} title="No jobs yet">
A job trains an adapter on the base that is served here, while it goes on serving. It begins with a JSONL file of conversations:
<a href="#/train/new">start a new job</a>.
<//>`}
${s?.length>0&&l`<div class="panel scroll" tabindex="0" role="region" aria-label="Table of jobs">
<table>
<thead><tr>${["Job","Status","Base","Result","Created"].map(i=>l`<th scope="col">${i}</th>`)}</tr></thead>
<tbody>
${s.map(i=>l`<tr key=${i.id}>
<th scope="row"><a href=${`#/train/${i.id}`}>${i.id}</a></th>
<td><${F} kind=${pn[i.status]}>${fn[i.status]??i.status}<//></td>
<td>${i.model}</td>
<td>${i.fine_tuned_model??i.error?.message??"–"}</td>
<td>${X(i.created_at)}</td>
</tr>`)}
</tbody>
</table>
<${$t} page=${e} count=${n} onMore=${()=>r(n+Br)} />
</div>`}
</section>`}var vn={compare:["Compare",Tr],adapters:["Adapters",kr],train:["Train",Hr],server:["Server",Nr]},xa=5;G(()=>{document.title=`${vn[K.value.view]?.[0]??"Not found"} · loramux`});function ka(){W(async()=>Z.value||await ht(),xa),A(()=>document.getElementById("main").focus({preventScroll:!0}),[K.value.view]);let[,e]=vn[K.value.view]??[];return l`
<a
class="skip"
href="#main"
onClick=${t=>(t.preventDefault(),document.getElementById("main").focus())}
>Skip to content</a>
<header class="top">
<a class="brand" href="#/compare"><img src="/page/icon.svg" alt="" width="24" height="24" />loramux</a>
<nav aria-label="Views">
${Object.entries(vn).map(([t,[n]])=>l`<a href=${`#/${t}`} aria-current=${K.value.view===t?"page":void 0}>${n}</a>`)}
</nav>
<span class="grow"></span>
<span class="serving">${B.value&&!Z.value&&l`<span class=${ge.value?"dot":"dot off"}></span>${B.value.id}`}</span>
${L.value&&l`<button type="button" class="quiet" onClick=${nr}>Sign out</button>`}
<button
type="button"
class="quiet icon"
aria-label=${He.value?"Light colours":"Dark colours"}
title=${He.value?"Light colours":"Dark colours"}
onClick=${lr}
>${He.value?"☀":"☾"}</button>
</header>
<div aria-live="assertive">
${!ge.value&&l`<p class="banner">The server cannot be reached. What runs there goes on; this page is trying to reconnect…</p>`}
</div>
<main id="main" tabindex="-1">
${Z.value?l`<${Ar} />`:Y.value?e?l`<${e} />`:l`<p>There is no such view. <a href="#/compare">Compare models</a> instead.</p>`:l`<${x} error=${Be.value} />${!Be.value&&l`<p class="muted">Asking the server…</p>`}`}
</main>
<footer class="foot muted">
${!Z.value&&!L.value&&l`<a href="/openapi.json">API description</a><a href="/metrics">Metrics</a>`}
<a href="/page/licenses.txt">Licences</a>
</footer>
`}An(l`<${ka} />`,document.body);
